"""Bad input: one clear line, exit code 2, nothing written. Run in this process for speed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_jax.commands.main import load_experiment, main
from transfusion_jax.config import stored as stored_config
from transfusion_jax.images import read_image, write_image

DIGITS = str(Path(__file__).parent.parent / "experiments" / "digits.py")


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must end with code 2 and one line."""
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--model.widht 3", "perhaps you meant --model.width"),
        ("--model.width wide", "--model.width"),
        ("--model.compute-dtype int8", "--model.compute-dtype"),
        ("--model.width", "--model.width"),
        (
            "--model.attention pallas --model.attention-block 128",
            "model.attention='pallas' runs on tpu; on cpu: chunked",
        ),
        ("--model.heads 3", "model.heads=3 must divide model.width=128"),
        ("--data.row-length 10", "data.row_length=10 is shorter than one image"),
        ("--mesh.data 3", "mesh.data=3"),
        ("--data.batch-rows 3 --mesh.data 8", "data.batch_rows=3 is not divisible"),
        ("--image.patch 3", "image.patch=3 must divide"),
        ("--data.sources.0.name digit", "'digit' is not one of"),
        ("--evaluation fid", "'fid' is not one of"),
        ("--tokenizer.path nowhere.model", "nowhere.model"),
        ("--train.steps -4", "train.steps=-4 must be positive"),
        ("--sampler.steps 5000", "sampler.steps=5000"),
        ("nonsense", "nonsense"),
    ],
)
def test_bad_overrides(capsys, tmp_path, overrides, message):
    run_dir = tmp_path / "run"
    assert message in fails(capsys, "train", DIGITS, "--run-dir", str(run_dir), *overrides.split())
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no experiment file"),
        ("x = 1", "has no function config()"),
        ("def config(): return 3", "returns int, not an Experiment"),
        ("def config(: pass", "SyntaxError"),
        ("import nowhere", "nowhere"),
    ],
)
def test_bad_experiment_files(capsys, tmp_path, content, message):
    path = tmp_path / "experiment.py"
    if content is not None:
        path.write_text(content)
    assert message in fails(capsys, "train", str(path))


def test_points_of_a_sweep(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from transfusion_jax.config import paper\ndef sweep():\n    yield paper('0.16B')\n    yield paper('7B')\n"
    )
    assert load_experiment(f"{path}:transfusion_7B").model.width == 4096
    with pytest.raises(
        ValueError, match="has no point '3B', only transfusion_0.16B, transfusion_7B"
    ):
        load_experiment(f"{path}:3B")
    with pytest.raises(ValueError, match=r"has no function config\(\)"):
        load_experiment(str(path))


def test_overrides_reach_every_kind_of_field():
    arguments = "--model.width 256 --data.sources.1.weight 2.5 --optimizer.b2 0.9 --evaluation sums --name x"
    got = load_experiment(DIGITS, arguments.split())
    assert (got.model.width, got.data.sources[1].weight, got.optimizer.b2) == (256, 2.5, 0.9)
    assert (got.evaluation, got.name) == (("sums",), "x")


def test_a_run_directory_of_another_config_is_never_touched(capsys, tmp_path):
    stored = stored_config.dumps(load_experiment(DIGITS))
    (tmp_path / "config.json").write_text(stored)
    arguments = ("--optimizer.learning-rate", "0.1", "--train.steps", "700", "--mesh.fsdp", "2")
    line = fails(capsys, "train", DIGITS, "--run-dir", str(tmp_path), *arguments)
    assert "optimizer.learning_rate: 0.002 -> 0.1; train.steps" in line and "mesh" not in line
    assert (tmp_path / "config.json").read_text() == stored
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_foreign_directory_is_never_touched(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds thesis.tex" in fails(capsys, "train", DIGITS, "--run-dir", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is a file" in fails(capsys, "train", DIGITS, "--run-dir", str(tmp_path / "thesis.tex"))


def test_config_survives_json_and_says_what_differs():
    experiment = load_experiment(DIGITS)
    assert stored_config.loads(stored_config.dumps(experiment), "x") == experiment
    other = load_experiment(DIGITS, ["--data.sources.0.weight", "3", "--mesh.fsdp", "2"])
    assert stored_config.differences(experiment, other) == ["data.sources.0.weight: 1.0 -> 3.0"]
    with pytest.raises(ValueError, match=r"broken\.json does not hold an experiment"):
        stored_config.loads("{}", "broken.json")
    later = json.loads(stored_config.dumps(experiment))
    later["model"]["moe"] = 3
    with pytest.raises(ValueError, match="moe"):
        stored_config.loads(json.dumps(later), "later.json")


def test_generate_refuses_bad_input(capsys, tmp_path):
    out = ("--out", str(tmp_path / "out"))
    assert "the prompt is empty" in fails(capsys, "generate", str(tmp_path), "--prompt", "", *out)
    assert "not a run directory" in fails(capsys, "generate", str(tmp_path), "--prompt", "x", *out)
    assert "--num 0" in fails(
        capsys, "generate", str(tmp_path), "--prompt", "x", "--num", "0", *out
    )
    assert "--frobnicate" in fails(
        capsys, "generate", str(tmp_path), "--prompt", "x", "--frobnicate", *out
    )
    assert "--out" in fails(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert "'fid' is not one of" in fails(capsys, "evaluate", str(tmp_path), "--suite", "fid")
    assert not (tmp_path / "out").exists()


def test_help_lists_the_fields_of_an_experiment(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", DIGITS, "--help"])
    assert "--optimizer.learning-rate" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--run-dir" in capsys.readouterr().out
    assert "name an experiment file" in fails(capsys, "train")


def test_no_command_and_unknown_command(capsys):
    assert "COMMAND" in fails(capsys)
    assert "frob" in fails(capsys, "frob")


def test_images_survive_a_file_and_are_cropped_and_resized(tmp_path):
    image = (np.random.default_rng(0).integers(0, 256, (8, 8, 1)) / 127.5 - 1).astype(np.float32)
    write_image(tmp_path / "a.png", image)
    np.testing.assert_allclose(read_image(tmp_path / "a.png", 8, 8, 1), image, atol=1e-6)
    ramp = np.broadcast_to(np.arange(0, 240, 3, np.uint8), (80, 80))
    Image.fromarray(ramp).save(tmp_path / "big.png")
    averages = ramp.reshape(8, 10, 8, 10).mean((1, 3))[..., None] / 127.5 - 1
    np.testing.assert_allclose(read_image(tmp_path / "big.png", 8, 8, 1), averages, atol=0.03)
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).convert("RGBA").save(tmp_path / "wide.png")
    np.testing.assert_allclose(
        read_image(tmp_path / "wide.png", 8, 8, 1), np.ones((8, 8, 1)), atol=1e-6
    )


def test_unreadable_images(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    truncated = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:200])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name, 8, 8, 1)
    with pytest.raises(ValueError, match="8 channels are no pixels"):
        read_image(truncated, 8, 8, 8)
