"""A stranger's folder of pictures and captions, through every command, as docs/data.md has it."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.autoencoder.config import tiny
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.commands.main import main

pytestmark = pytest.mark.one_jax

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
EXPERIMENT = """
from transfusion_jax.config import *
from transfusion_jax.data.sources.dataset import open_dataset

DATA = {data!r}

def config():
    dataset = open_dataset(DATA)
    image = dataset.image_config(patch={patch})
    return Experiment(
        name="mine",
        image=image,
        model=ModelConfig(
            layers=1, width=32, heads=2, mlp_width=32, vocab_size=dataset.embedding_rows,
            compute_dtype="float32"
        ),
        data=DataConfig(
            sources=(SourceConfig(DATA),), row_length=2 * image.span + 40, batch_rows=8,
            max_epochs=0.5
        ),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=4, log_every=1, checkpoint_every=2),
        sampler=SamplerConfig(steps=2, max_tokens=image.span + 8),
        evaluation=("likelihood", "pairs"),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of three colours with captions, and one line that cannot be used."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for number in range(60):
        name, colour = list(COLOURS.items())[number % 3]
        picture = Image.new("RGB", (32, 32), colour)
        picture.putpixel((number % 32, 8 * (number // 32)), (255, 255, 255))
        picture.save(folder / f"{number}.png")
        lines.append({"file": f"{number}.png", "caption": f"a {name} picture"})
    lines.append({"file": "gone.png", "caption": "not there"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    """An autoencoder from 32x32x3 to 8x8x4 that nobody trained."""
    path = tmp_path_factory.mktemp("codec") / "codec"
    _, abstract = abstract_autoencoder(tiny())
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32)  # noqa: E731
    save_codec(path, tiny(), jax.tree.map(draw, nnx.to_pure_dict(abstract)), 1.0, 0.0)
    return path


def prepare(folder: Path, out: Path, *more: str) -> int:
    size = ("--height", "32", "--width", "32", "--vocab-size", "300")
    return main(
        [
            "prepare",
            str(folder),
            "--out",
            str(out),
            *size,
            "--held-out",
            "0.2",
            "--reject-limit",
            "0.05",
            *more,
        ]
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param("pixels", marks=pytest.mark.slow), "latents"])
def test_from_a_folder_to_a_sample(kind, folder, codec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        prepare(
            folder, Path("data/mine"), *(["--autoencoder", str(codec)] if kind == "latents" else [])
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "1 files that the captions" in said
        and "61 read = 60 written + 1 rejected (1 missing file" in said
    )
    assert (tmp_path / "data/mine/contact_sheet.png").exists()

    Path("mine.py").write_text(
        EXPERIMENT.format(data="data/mine", patch=8 if kind == "pixels" else 2)
    )
    assert main(["inspect", "mine.py", "--row", "2"]) == 0
    said = capsys.readouterr().out
    assert "picture [image t < 1000]" in said and "first 256 rows" in said
    with Image.open("mine_row_2.png") as picture:
        assert picture.width > 500

    assert main(["train", "mine.py"]) == 0
    said = capsys.readouterr().out
    assert "repeated  data/mine is read" in said
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert np.isfinite(summary["text_perplexity"]) and 0 <= summary["drawn_share"] <= 1
    logged = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["epochs/data/mine"] == pytest.approx(
        2 * logged[1]["epochs/data/mine"], abs=1e-3
    )

    if kind == "latents":  # what a run decodes with is what its data were scaled with
        stored = json.loads(Path("data/mine/dataset.json").read_text())["image"]
        kept = json.loads(Path("runs/mine/autoencoder/config.json").read_text())
        assert (kept["scale"], kept["shift"]) == (stored["scale"], stored["shift"]) != (1.0, 0.0)

    # The run directory is enough: the data and the autoencoder may be gone.
    shutil.move("data", "elsewhere")
    assert (
        main(
            [
                "generate",
                "runs/mine",
                "--image",
                str(folder / "0.png"),
                "--prompt",
                "a",
                "--out",
                "out",
            ]
        )
        == 0
    )
    assert (
        main(["generate", "runs/mine", "--prompt", "a red picture", "--seed", "3", "--out", "out2"])
        == 0
    )
    for path in tmp_path.glob("out*/*.png"):
        with Image.open(path) as picture:
            assert picture.size == (32, 32)


@pytest.mark.long
def test_text_alone_has_an_experiment_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"The {number}th text says little. " * 20)
    for name in ("data/text", "data/mine"):
        assert prepare(texts, Path(name)) == 0
    capsys.readouterr()
    assert main(["train", str(EXPERIMENTS / "own_data.py")]) == 2
    said = capsys.readouterr().err
    assert "no training document of data/mine has an image" in said and "own_text.py" in said
    few = "--train.steps 2 --optimizer.warmup-steps 1 --model.layers 1 --model.width 32"
    assert main(["train", str(EXPERIMENTS / "own_text.py"), *few.split()]) == 0
    assert json.loads(Path("runs/own_text/summary.json").read_text())["text_perplexity"] > 1
    line = ["generate", "runs/own_text", "--prompt", "The", "--max-tokens", "4", "--out", "out"]
    assert main(line) == 0


@pytest.mark.long
def test_data_that_changed_or_does_not_fit_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare(folder, Path("data/mine")) == 0
    Path("mine.py").write_text(EXPERIMENT.format(data="data/mine", patch=8))
    assert main(["train", "mine.py", "--evaluation"]) == 0
    shutil.rmtree("data/mine")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    Image.new("RGB", (32, 32), "white").save(other / "0.png")
    assert prepare(other, Path("data/mine")) == 0
    capsys.readouterr()
    assert main(["train", "mine.py", "--evaluation"]) == 2
    assert "has changed since it was trained: data/mine" in capsys.readouterr().err

    for overrides, message in (
        (
            ("--image.height", "64", "--sampler.max-tokens", "40"),
            "--image.height 32 --image.width 32 --image.channels 3",
        ),
        (("--data.sources.0.name", "data/none"), "nor a directory of prepared data"),
        (("--data.sources.0.name", "other"), "other is no prepared data set"),
        (("--model.vocab-size", "64"), "model.vocab_size=64"),
    ):
        assert main(["train", "mine.py", "--run-dir", "runs/other", *overrides]) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1, line
    assert not Path("runs/other").exists()
    shard = next(Path("data/mine/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["train", "mine.py", "--run-dir", "runs/other"]) == 2
    assert "when it was prepared" in capsys.readouterr().err


def test_sources_prepared_with_other_tokenizers_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("quite other words than those of the pictures\n" * 20)
    assert prepare(folder, Path("data/mine")) == prepare(tmp_path / "text", Path("data/text")) == 0
    both = EXPERIMENT.format(data="data/mine", patch=8).replace(
        "(SourceConfig(DATA),)", "(SourceConfig(DATA), SourceConfig('data/text'))"
    )
    Path("both.py").write_text(both)
    capsys.readouterr()
    assert main(["train", "both.py"]) == 2
    assert (
        "data/mine and data/text were prepared with different tokenizers" in capsys.readouterr().err
    )
    shutil.rmtree("data/text")
    assert (
        prepare(tmp_path / "text", Path("data/text"), "--tokenizer", "data/mine/tokenizer.model")
        == 0
    )
    assert main(["inspect", "both.py"]) == 0


@pytest.mark.slow
def test_two_processes_prepare_what_one_does(folder, codec, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = "import sys; from test_own_data import prepare; sys.exit(prepare(*sys.argv[1:]))"
    given = ("--autoencoder", str(codec), "--shard-bytes", "10000")
    joining = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id")
    shards = []
    for name, flags in (("one", [()]), ("two", [(*joining, "0"), (*joining, "1")])):
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / name), *given]
        processes = [
            subprocess.Popen([*command, *more], cwd=Path(__file__).parent) for more in flags
        ]
        assert {process.wait(200) for process in processes} == {0}
        files = (tmp_path / name / "shards").glob("*.arrayrecord")
        shards.append({file.name: file.read_bytes() for file in files})
    one, two = shards
    assert len(one) > 2 and one == two
