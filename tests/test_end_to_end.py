"""The command line in processes of its own: train, be killed, resume, generate, evaluate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXPERIMENT = """
from transfusion_jax.config import *

def config():
    return Experiment(
        name="tiny",
        image=ImageConfig(8, 8, 1, 2),
        model=ModelConfig(
            layers=1, width=32, heads=2, mlp_width=32, vocab_size=512, compute_dtype="float32"
        ),
        data=DataConfig(
            sources=(SourceConfig("digits"), SourceConfig("sums")), row_length=64, batch_rows=4
        ),
        tokenizer=TokenizerConfig(vocab_size=480),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        train=TrainConfig(steps=120, vocab_chunk=64, log_every=1, checkpoint_every=20),
        sampler=SamplerConfig(steps=2, clip=1.0, max_tokens=24),
        evaluation=("sums", "likelihood"),
    )
"""
LOSSES = ("loss", "text_loss", "image_loss", "grad_norm", "learning_rate")


def start(*arguments) -> subprocess.Popen:
    """A command, which compiles as a user's does."""
    command = [sys.executable, "-m", "transfusion_jax", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as file:
        return file.size


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The experiment file, and an uninterrupted run of it."""
    path = tmp_path_factory.mktemp("work")
    (path / "tiny.py").write_text(EXPERIMENT)
    said = finish(start("train", path / "tiny.py", "--run-dir", path / "whole"))
    return path, said


def test_a_run_leaves_what_it_promises(workplace):
    path, said = workplace
    whole = path / "whole"
    lines = said.splitlines()
    assert "tiny" in lines[0] and "parameters" in lines[0] and "120 of 120 steps" in said
    # Of events there may be none.
    assert {p.name for p in whole.iterdir()} - {"events.jsonl"} == {
        "config.json",
        "tokenizer.model",
        "ledger.json",
        "checkpoints",
        "goodput.json",
        "lock",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "summary.json",
    }
    rows = logged(whole)
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert {*LOSSES, "tokens_per_second", "data_wait_share", "step_seconds"} <= set(rows[0])
    assert all(row["model_flops_per_second"] > 0 and 0 <= row["goodput"] < 1 for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 120 and summary["train_seconds"] > 0
    assert summary["tokens"] == 120 * 4 * 64
    flops = sum(row["model_flops_per_second"] * row["step_seconds"] for row in rows)
    assert summary["model_flops"] == pytest.approx(flops, rel=1e-2)
    assert 0 <= summary["text_accuracy"] <= 1 and summary["text_perplexity"] > 1
    assert len(summary["image_loss_by_timestep"]) == 10
    assert size_of(whole / "samples" / "curves.png")[0] > 100
    ledger = json.loads((whole / "ledger.json").read_text())
    assert ledger["digits"]["documents"] == ledger["digits"]["in_rows"] == 1500


def test_killed_stopped_and_resumed_equals_uninterrupted_bit_for_bit(workplace):
    path, _ = workplace
    run_dir = path / "interrupted"
    # Before the first checkpoint, after one, and politely.
    for step, number in ((1, signal.SIGKILL), (24, signal.SIGKILL), (45, signal.SIGTERM)):
        process = start("train", path / "tiny.py", "--run-dir", run_dir)
        wait_for_step(run_dir, step, process)
        process.send_signal(number)
        said, err = process.communicate()
    assert process.returncode == 42, err
    assert "stopped by SIGTERM at step" in said
    last = logged(run_dir)[-1]["step"]
    assert 45 <= last < 120 and (run_dir / "checkpoints" / str(last)).is_dir()
    assert not (run_dir / "summary.json").exists()
    said = finish(start("train", path / "tiny.py", "--run-dir", run_dir))
    assert "resuming from checkpoint" in said
    whole, resumed = logged(path / "whole"), logged(run_dir)
    assert [{k: row[k] for k in ("step", *LOSSES)} for row in resumed] == [
        {k: row[k] for k in ("step", *LOSSES)} for row in whole
    ]
    numbers = [json.loads((p / "summary.json").read_text()) for p in (path / "whole", run_dir)]
    assert numbers[0]["text_perplexity"] == numbers[1]["text_perplexity"]
    account = json.loads((run_dir / "goodput.json").read_text())
    assert account["starts"] == 4 and account["seconds"]["repeated"] > 0
    assert numbers[1]["goodput"] > 0 and account["seconds"]["evaluation"] > 0


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(workplace):
    path, _ = workplace
    before = (path / "whole" / "metrics.jsonl").read_text()
    finish(start("train", path / "tiny.py", "--run-dir", path / "whole"))
    assert (path / "whole" / "metrics.jsonl").read_text() == before


def test_generate_and_evaluate(workplace):
    path, _ = workplace
    picture = path / "digit.png"
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(picture)
    asked = ["--image", picture, "--prompt", "three plus four is", "--num", "2"]
    drawn = ["--temperature", "1", "--steps", "2", "--out", path / "out"]
    finish(start("generate", path / "whole", *asked, *drawn))
    lines = [json.loads(line) for line in (path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(set(span) in ({"text"}, {"image"}) for line in lines for span in line["spans"])
    pictures = [span["image"] for line in lines for span in line["spans"] if "image" in span]
    assert pictures == [f"{i}.png" for i in range(len(pictures))]
    assert all(size_of(path / "out" / name) == (8, 8) for name in pictures)
    finish(
        start("evaluate", path / "whole", "--suite", "likelihood", "--out", path / "numbers.json")
    )
    stored = json.loads((path / "whole" / "summary.json").read_text())
    assert (
        json.loads((path / "numbers.json").read_text())["text_perplexity"]
        == stored["text_perplexity"]
    )
