"""Bad input: one clear line, exit code 2, nothing written. In this process, for speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_jax.commands.experiments import load_experiment
from transfusion_jax.commands.main import main
from transfusion_jax.config import stored as stored_config
from transfusion_jax.files import write_json
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
        ("--evaluation scenes", "suite 'scenes' judges pictures of 32x32x3 or 64x64x3"),
        ("--profile 5", "--profile 5 is not START:STOP, as in 20:25"),
        ("--profile 0:4", "--profile 0:4 must be steps from 1 to train.steps="),
        ("--profile 7:5", "--profile 7:5 must be steps from 1"),
        ("--profile 5:99999999", "must be steps from 1"),
        ("--train.validate-every -1", "train.validate_every=-1 must not be negative"),
        ("--train.sample-every 5", "train.sample_every=5 needs train.sample_prompts"),
        ("--train.spike-window 0", "train.spike_window=0 must be positive"),
        ("--tyro-print-completion bash", "cannot use --tyro-print-completion bash"),
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
        ("raise SystemExit(3)", "fails with SystemExit: 3"),
        ("def config(): return int('x')", "experiment.py: invalid literal for int()"),
        ("config = 3", "'int' object is not callable"),
        ("\0", "null bytes"),
    ],
)
def test_bad_experiment_files(capsys, tmp_path, content, message):
    path = tmp_path / "experiment.py"
    if content is not None:
        path.write_text(content)
    assert message in fails(capsys, "train", str(path))


@pytest.mark.parametrize("inside", [False, True])
def test_an_experiment_imports_those_beside_it(tmp_path, inside):
    """At the top of the file, or when its function is called; and the path is as before."""
    name = f"beside_{inside}".lower()
    (tmp_path / f"{name}.py").write_text("WIDTH = 48\n")
    imported = f"from {name} import WIDTH"
    top, within = ("", imported) if inside else (imported, "pass")
    path = tmp_path / "experiment.py"
    path.write_text(
        f"from transfusion_jax.config import Experiment, ModelConfig\n{top}\n"
        f"def config():\n    {within}\n"
        "    return Experiment('x', model=ModelConfig(width=WIDTH, heads=4))\n"
    )
    before = list(sys.path)
    assert load_experiment(str(path)).model.width == 48
    assert sys.path == before


def test_points_of_a_sweep(tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from transfusion_jax.config import paper\n"
        "def sweep():\n    yield paper('0.16B')\n    yield paper('7B')\n"
    )
    assert load_experiment(f"{path}:transfusion_7B").model.width == 4096
    with pytest.raises(
        ValueError, match="has no point '3B', only transfusion_0.16B, transfusion_7B"
    ):
        load_experiment(f"{path}:3B")
    with pytest.raises(ValueError, match=r"has no function config\(\)"):
        load_experiment(str(path))
    for body, message in (
        ("yield 3", r"sweep\(\) of .* must yield experiments"),
        ("yield int('x')", "invalid literal for int"),
        ("return 3", "fails with TypeError"),
    ):
        path.write_text(f"def sweep():\n    {body}\n")
        with pytest.raises(ValueError, match=message):
            load_experiment(f"{path}:a")


def test_overrides_reach_every_kind_of_field():
    arguments = "--model.width 256 --data.sources.1.weight 2.5 --optimizer.b2 0.9 --name x"
    arguments += " --evaluation sums"
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
    assert stored_config.differences(experiment, other) == ["data.sources.0.weight: 2.0 -> 3.0"]
    with pytest.raises(ValueError, match=r"broken\.json does not hold an experiment"):
        stored_config.loads("{}", "broken.json")
    later = json.loads(stored_config.dumps(experiment))
    later["model"]["moe"] = 3
    with pytest.raises(ValueError, match="moe"):
        stored_config.loads(json.dumps(later), "later.json")


RUN = "{}"
"""Stands for a directory that is there, and no run."""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate {} --prompt x", "--out"),
        ("generate {} --prompt= --out {}/out", "the prompt is empty"),
        ("generate {} --prompt x --out {}/out", "not a run directory"),
        ("generate {} --prompt x --num 0 --out {}/out", "--num 0 must be at least 1"),
        ("generate {} --prompt x --num 1.5 --out {}/out", "invalid int value: '1.5'"),
        ("generate {} --prompt x --seed -1 --out {}/out", "--seed -1 must be in 0..2^32 - 1"),
        ("generate {} --prompt x --frobnicate --out {}/out", "--frobnicate"),
        ("generate {} --prompt x --out {}/file", "file is a file, not a directory"),
        ("generate {} --prompt x --out {}/file/out", "file is a file, not a directory"),
        ("generate --prompt x --out {}/out", "RUN_DIR"),
        ("evaluate {}", "not a run directory"),
        ("evaluate {} --suite fid", "'fid' is not one of"),
        ("evaluate {} --max-rows 0", "--max-rows 0 must be a positive number or `all`"),
        ("evaluate {} --max-rows some", "--max-rows some must be"),
        ("evaluate {} --out {}", "is a directory, not a file"),
        ("evaluate {} --out {}/none/x.json", "none is not a directory"),
        ("evaluate {} --out {}/pipe", "pipe is not a regular file"),
        ("evaluate {} --seed 3", "unknown arguments: --seed 3"),
        (f"evaluate {'x' * 300}", "File name too long"),
        ("train", "name an experiment file (see transfusion-jax train --help)"),
        ("inspect", "name an experiment file (see transfusion-jax inspect --help)"),
        (f"inspect {DIGITS} --row -1", "--row -1 must be in"),
        (f"inspect {DIGITS} --row {10**15}", "must be in 0..10^15 - 1"),
        (f"inspect {DIGITS} --out {{}}/x.txt", "x.txt must end in one of"),
        (f"inspect {DIGITS} --out {{}}/none/x.png", "none is not a directory"),
        (f"inspect {DIGITS} --out {{}}", "is a directory, not a file"),
        ("autoencoder", "name an experiment file (see transfusion-jax autoencoder --help)"),
        (f"autoencoder {DIGITS}", "returns Experiment, not an AutoencoderExperiment"),
        ("plan", "name an experiment file (see transfusion-jax plan --help)"),
        (f"plan {DIGITS}", "name a topology"),
        (f"plan {DIGITS} --topology v5p:4x4x4 --json {{}}", "is a directory, not a file"),
        ("prepare {}", "name the directory to make: --out DIR"),
        ("prepare --out {}/out", "name at least one input"),
        ("prepare {} --out {}/out --part 5/4", "--part 5/4 is not one of 4 parts"),
        ("prepare {} --out {}/out --workers 0", "--workers 0 must be at least 1"),
        ("prepare {} --out {}/out --frob 3", "--frob"),
        (f"prepare {DIGITS} --out {{}}/out", "returns Experiment, not a Preparation"),
        ("prepare none.py --out {}/out", "there is no experiment file none.py"),
        (f"train {DIGITS} --run-dir gs://b/run", "gs://b/run is not a local path"),
        (f"train {DIGITS} --data.sources.0.name gs://b/data", "gs://b/data is not a local path"),
        (f"train {DIGITS} --tokenizer.path gs://b/t", "gs://b/t is not a local path"),
        ("generate s3://b/run --prompt x --out {}/out", "s3://b/run is not a local path"),
        ("train gs://b/x.py", "gs://b/x.py is not a local path"),
        ("evaluate gs://b/run", "gs://b/run is not a local path"),
        ("prepare gs://b/pictures --out {}/out", "gs://b/pictures is not a local path"),
        ("prepare {} --out {}/out --num-processes 2 --process-id 1", "--coordinator must be given"),
        (f"train {DIGITS} --run-dir GS://b/run", "GS://b/run is not a local path"),
        (f"inspect {DIGITS} --run-dir gs://b/run", "gs://b/run is not a local path"),
        ("prepare {} --out gs://b/data", "gs://b/data is not a local path"),
        (
            f"prepare {Path(DIGITS).parent} --out {{}}/out --autoencoder gs://b/v",
            "gs://b/v is not a local",
        ),
        ("generate {} --prompt x --out {}/out --mesh.rows 2", "--mesh.rows"),
        ("", "COMMAND"),
        ("frob", "'frob'"),
        ("frob --help", "'frob'"),
        ("train none.py --help", "there is no experiment file none.py"),
    ],
)
def test_bad_input_of_every_command(capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert message in fails(capsys, *(word.replace(RUN, str(tmp_path)) for word in line.split()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_what_is_written_through_a_link_stays_behind_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "1\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_inspect_draws_the_first_images_of_a_row_of_many(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", DIGITS, "--data.row-length", "2048"]) == 0
    assert "; the first 32 images are drawn, 49 more are not" in capsys.readouterr().out
    with Image.open("digits_row_0.png") as picture:
        assert picture.height > 1200


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


def test_commands_start_without_what_they_may_not_need():
    """scikit-learn, and torch where it is installed, take a second each to import."""
    code = (
        "import sys, transfusion_jax.generation.engine, transfusion_jax.evaluation.suite,"
        " transfusion_jax.training.loop;"
        " print({'sklearn', 'torch', 'tensorboardX'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
