"""Help and exit codes of the commands; generate and evaluate on an engine without a model."""

import argparse
import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tyro
from fake_engine import FakeEngine
from PIL import Image

from transfusion_jax.commands import main as command_line
from transfusion_jax.commands.help import flags, sections
from transfusion_jax.commands.main import COMMANDS, main
from transfusion_jax.commands.terminal import say, table
from transfusion_jax.config import ImageConfig, SourceConfig
from transfusion_jax.data.sources.sums import problems
from transfusion_jax.errors import WorkFailed
from transfusion_jax.generation import engine as engine_module
from transfusion_jax.generation.outputs import write_outputs
from transfusion_jax.pretraining import run as run_module

DIGITS = str(Path(__file__).parent.parent / "experiments" / "digits.py")
PICTURE = np.full((8, 8, 1), 0.5, np.float32)


def printed(capsys, *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag_and_field_and_explains_flags(capsys, name):
    said = printed(capsys, name, "--help")
    assert printed(capsys, name, "-h") == said and said.startswith(f"usage: transfusion-jax {name}")
    for action in command_line._parsers()[1][name]._actions:
        for flag in action.option_strings or [action.metavar]:
            assert re.search(rf"^  .*{re.escape(flag)}\b", said, re.MULTILINE), flag
        assert action.help and action.help in " ".join(said.split()).replace("- ", "-")
    if COMMANDS[name].config is not None:
        fields = flags(COMMANDS[name].config())
        assert fields and all(f"\n  {flag} " in said for flag in fields)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("train", ["--run-dir", "--model.layers", "--data.sources.0.weight", "--evaluation"]),
        ("inspect", ["--row", "--model.layers", "--data.row-length"]),
        ("plan", ["--topology", "--model.layers", "--mesh.fsdp"]),
        ("check", ["--run-dir", "--coordinator", "--process-id", "--model.layers"]),
        ("autoencoder", ["--run-dir", "--model.latent-channels", "--loss.kl"]),
        ("prepare", ["--part", "--workers", "--finish", "--height", "--columns.caption"]),
        ("sweep", ["--only", "--index", "--dry-run", "--table", "--out", "--model.layers"]),
        ("generate", ["--max-tokens", "--guidance", "--prompt"]),
        ("evaluate", ["--max-rows", "--suite"]),
    ],
)
def test_help_names_these(capsys, name, some):
    said = printed(capsys, name, "--help")
    assert [flag for flag in some if f"\n  {flag} " not in said] == []


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if command.config is not None]
)
def test_help_names_the_fields_that_overrides_take(name):
    config = COMMANDS[name].config()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        flag_conversion = (tyro.conf.FlagConversionOff,)
        tyro.cli(type(config), default=config, args=["--help"], config=flag_conversion)
    taken = set(re.findall(r"^[│| ]+(--[a-z][\w.-]*)", said.getvalue(), re.MULTILINE))
    assert set(flags(config)) == taken - {"--help"}


def test_help_shows_the_values_of_an_experiment(capsys, tmp_path):
    default = printed(capsys, "train", "--help")
    assert re.search(r"--model\.layers INT\s+Transformer layers\. \(default: 16\)", default)
    for line in (("train", DIGITS, "--help"), ("train", "--help", DIGITS), ("plan", "-h", DIGITS)):
        said = printed(capsys, *line)
        assert re.search(r"--model\.layers INT\s+Transformer layers\. \(default: 4\)", said)
        assert "--data.sources.1.weight" in said and "--data.sources.1.weight" not in default
    file = tmp_path / "own.py"
    file.write_text(
        "from transfusion_jax.preparation.prepare import Preparation\n"
        "def config(): return Preparation(height=48)\n"
    )
    said = printed(capsys, "prepare", str(file), "-h")
    assert re.search(r"--height INT .*?default:\s+48\)", said, re.DOTALL)


def test_help_explains_fields_and_their_sections(capsys):
    said = " ".join(printed(capsys, "train", "--help").split())
    assert "fields of model: A Llama-style transformer: pre-RMSNorm" in said
    assert "--model.kv-heads INT Key and value heads; 0 means as many as" in said
    assert "--model.remat {none,minimal,attention,full,offload} What the backward pass" in said


@pytest.mark.parametrize("name", ["train", "autoencoder"])
def test_help_explains_every_field(name):
    config = COMMANDS[name].config()
    bare = [flag for _, _, fields in sections(config) for flag, _, text in fields if text[0] == "("]
    assert not bare


def test_the_commands_are_listed_without_importing_jax():
    program = (
        "import sys\n"
        "from transfusion_jax.commands.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'jax', 'flax', 'matplotlib', 'sklearn', 'grain', 'numpy', 'tyro', 'tqdm'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"\n    {name}" in run.stdout for name in COMMANDS)
    assert "Exit codes: 0" in run.stdout


# Exit codes


def running(monkeypatch, work) -> None:
    """Makes `evaluate` do this work."""
    command = replace(COMMANDS["evaluate"], run=work)
    monkeypatch.setitem(COMMANDS, "evaluate", command)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (type("OutOfLuck", (WorkFailed,), {})("no\nluck"), "no luck"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left"), "the disk is full: [Errno 28] No space left"),
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
    ],
)
def test_work_that_fails_ends_with_one_line_and_code_1(capsys, monkeypatch, error, message):
    def work(arguments: argparse.Namespace) -> int:
        raise error

    running(monkeypatch, work)
    assert main(("evaluate", "x")) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, BrokenProcessPool])
def test_faults_of_ours_are_not_dressed_up(monkeypatch, kind):
    def work(arguments: argparse.Namespace) -> int:
        raise kind("a fault")

    running(monkeypatch, work)
    with pytest.raises(kind, match="a fault"):
        main(("evaluate", "x"))


def left(monkeypatch) -> list[int]:
    """The codes with which this process, as if it had joined others, leaves them."""
    codes = []
    others = SimpleNamespace(joined=lambda: True, leave=lambda code, at_once: codes.append(code))
    monkeypatch.setitem(sys.modules, "transfusion_jax.parallel.processes", others)
    return codes


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, jax.errors.JaxRuntimeError])
def test_one_of_several_processes_shows_a_fault_and_does_not_wait(capsys, monkeypatch, kind):
    """An exception that left `main` would wait minutes for the others."""

    def work(arguments: argparse.Namespace) -> int:
        raise kind("INVALID_ARGUMENT: a fault")

    running(monkeypatch, work)
    codes = left(monkeypatch)
    assert main(("evaluate", "x")) == 1
    assert codes == [1]
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("error: INVALID_ARGUMENT: a fault\n")


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted prematurely",
        "UNAVAILABLE: a device",
        "ABORTED: a transfer",
        "DATA_LOSS: a transfer",
        "FAILED_PRECONDITION: The program continuator has halted unexpectedly.",
    ],
)
def test_hardware_that_fails_is_one_line_and_may_work_again(capsys, monkeypatch, message, alone):
    def work(arguments: argparse.Namespace) -> int:
        raise jax.errors.JaxRuntimeError(f"{message}\nand details")

    running(monkeypatch, work)
    codes = [] if alone else left(monkeypatch)
    assert main(("evaluate", "x")) == 42
    assert codes == ([] if alone else [42])
    line = "error: a device, a transfer or the compiler failed; the same command tries again"
    said = capsys.readouterr().err
    assert said.endswith(f"\n{line}: {message}\n") and "and details" in said


def test_a_compiler_that_fails_a_plan_is_a_fault(monkeypatch):
    def work(arguments: argparse.Namespace) -> int:
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed")

    monkeypatch.setitem(COMMANDS, "plan", replace(COMMANDS["plan"], run=work))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        main(("plan", "x"))


FIRST = """
import os
import signal
from dataclasses import replace

own = os.getpid()
os.getpid = lambda: 1
from transfusion_jax.commands.main import COMMANDS, main

def run(arguments):
    os.kill(own, signal.SIGTERM)
    signal.pause()

COMMANDS["evaluate"] = replace(COMMANDS["evaluate"], run=run)
main(("evaluate", "x"))
"""


def test_the_first_process_of_a_container_hears_sigterm_from_its_start():
    """The kernel would drop it; here it would end with -15."""
    assert subprocess.run([sys.executable, "-c", FIRST], timeout=100).returncode == 42


def test_a_killed_process_of_preparation_is_work_that_failed(capsys, monkeypatch, tmp_path):
    def killed(*_):
        raise BrokenProcessPool("A process was terminated abruptly")

    monkeypatch.setattr("transfusion_jax.preparation.prepare.prepare", killed)
    assert main(("prepare", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "3")) == 1
    said = capsys.readouterr().err
    assert "was killed" in said and "workers=3" in said and said.count("\n") == 1


# Generate and evaluate, on an engine without a model


@pytest.fixture
def engine(experiment, tokenizer, monkeypatch) -> FakeEngine:
    """The engine of every run directory: completes sums, or answers a text and a picture."""
    every = dict(problems("train") + problems("held_out"))

    def answer(*request):
        return [every[request[0]]] if str(request[0]) in every else ["ünd", PICTURE]

    found = FakeEngine(replace(experiment, evaluation=("sums",)), tokenizer, answer)
    monkeypatch.setattr(engine_module, "load_engine", lambda *_: (found, 40))
    monkeypatch.setattr(run_module, "stored", lambda *_: (found.experiment, {}))
    return found


def test_generate_asks_as_it_is_told(engine, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "white.png")
    options = {
        "guidance": 1.5,
        "steps": 3,
        "candidates": 5,
        "temperature": 0.5,
        "max_tokens": 77,
    }
    words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    image = ("--image", str(tmp_path / "white.png"))
    out = tmp_path / "out"
    line = ("generate", "run", "--prompt", "a", "--num", "2", *image, "--out", str(out))
    said = printed(capsys, *line, *words)
    (call,) = engine.calls
    assert call.sampler == replace(engine.experiment.sampler, **options)
    assert len(call.requests) == 2
    white, text = call.requests[0]
    assert text == "a" and white.shape == (8, 8, 1) and (white == 1).all()

    stored = (out / "outputs.jsonl").read_text(encoding="utf-8")
    assert said.startswith(stored)
    assert [json.loads(line) for line in stored.splitlines()] == [
        {"prompt": "a", "spans": [{"text": "ünd"}, {"image": f"{i}.png"}]} for i in range(2)
    ]
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "outputs.jsonl"]

    printed(capsys, *line, "--temperature", "0", "--guidance", "0")
    none = replace(engine.experiment.sampler, temperature=0.0, guidance=0.0)
    assert engine.calls[-1].sampler == none
    printed(capsys, *line)
    assert engine.calls[-1].sampler == engine.experiment.sampler


def test_an_answer_beyond_the_positions_of_training_is_said(engine, tmp_path, capsys):
    line = ("generate", "run", "--prompt", "a", "--out", str(tmp_path / "out"), "--max-tokens")
    for most, said in (("97", "note: the answer may reach position 97, and none beyond 96 was"),
                       ("96", "")):  # fmt: skip
        assert main((*line, most)) == 0
        assert capsys.readouterr().err.startswith(said) and bool(said) == (most == "97")


def test_a_setting_that_cannot_work_is_bad_input(engine, tmp_path, capsys):
    line = ("generate", "run", "--prompt", "a", "--out", str(tmp_path / "out"))
    for option in ("--max-tokens", "--steps", "--candidates"):
        assert main((*line, option, "0")) == 2
        field = option[2:].replace("-", "_")
        assert f"sampler.{field}=0" in capsys.readouterr().err
    assert main((*line, "--image", str(tmp_path / "none.png"))) == 2
    assert "cannot read the image" in capsys.readouterr().err
    assert engine.calls == [] and not (tmp_path / "out").exists()


def test_evaluate_draws_as_it_is_told_and_says_so(engine, capsys):
    options = {"guidance": 1.5, "steps": 3, "candidates": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert json.loads(printed(capsys, "evaluate", "run", *words))["sampler"] == options
    assert engine.calls[-1].sampler == replace(engine.calls[-1].sampler, **options)
    assert "sampler" not in json.loads(printed(capsys, "evaluate", "run"))
    for option in ("--steps", "--candidates"):
        assert main(("evaluate", "run", option, "0")) == 2
        assert f"sampler.{option[2:]}=0" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--draw", "--candidates 4", "--steps 7", "--guidance 0"])
def test_a_model_of_text_alone_is_not_asked_for_images(
    engine, tmp_path, capsys, monkeypatch, words
):
    text = replace(engine.experiment.model, family="llama", image_attention="causal")
    sources = (SourceConfig("sums"),)
    data = replace(engine.experiment.data, sources=sources)
    found = replace(engine, experiment=replace(engine.experiment, model=text, data=data))
    monkeypatch.setattr(engine_module, "load_engine", lambda *_: (found, 40))
    line = ("generate", "run", "--prompt", "a", "--out", str(tmp_path / "out"))
    flag, *_ = words = words.split()
    assert main((*line, *words)) == 2
    assert f"{flag}: the model of run is of text alone" in capsys.readouterr().err


def test_latents_without_an_autoencoder_are_no_pictures(engine, tmp_path, capsys, monkeypatch):
    line = ("generate", "run", "--prompt", "a", "--out", str(tmp_path / "out"))
    model = engine.experiment.model
    chameleon = replace(model, family="chameleon", image_attention="causal")
    for family, image, said in (
        (model, ImageConfig(4, 4, 8), "images of 8 channels are no pixels"),
        (chameleon, ImageConfig(4, 4, 1, 1, 64), "images of 64 codes are no pixels"),
    ):
        experiment = replace(engine.experiment, model=family, image=image)
        latents = replace(engine, experiment=experiment)
        monkeypatch.setattr(engine_module, "load_engine", lambda *_, found=latents: (found, 40))
        assert main(line) == 2
        assert said in capsys.readouterr().err
        assert main(("evaluate", str(tmp_path), "--suite", "pairs")) == 2
        assert said in capsys.readouterr().err
    assert engine.calls == [] and not (tmp_path / "out").exists()


def test_every_prompt_is_a_request_behind_all_images(engine, tmp_path, capsys):
    images = []
    for value in (255, 0):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"{value}.png")
        images += ["--image", str(tmp_path / f"{value}.png")]
    prompts = ("--prompt", "a", "--prompt", "b")
    line = ("generate", "run", *prompts, *images, "--out", str(tmp_path / "out"))
    printed(capsys, *line, "--num", "2")
    (call,) = engine.calls
    assert [text for *_, text in call.requests] == ["a", "a", "b", "b"]
    assert all([x.mean() for x in shown] == [1, -1] for *shown, _ in call.requests)
    stored = (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in stored] == ["a", "a", "b", "b"]


def test_outputs_of_several_answers_number_their_pictures_on(tmp_path):
    answers = [[PICTURE, "x", PICTURE], [], ["y"], [PICTURE]]
    lines = [json.loads(line) for line in write_outputs(tmp_path, "pqrs", answers).splitlines()]
    assert "".join(line["prompt"] for line in lines) == "pqrs"
    assert [line["spans"] for line in lines] == [
        [{"image": "0.png"}, {"text": "x"}, {"image": "1.png"}],
        [],
        [{"text": "y"}],
        [{"image": "2.png"}],
    ]


def test_what_was_evaluated_is_printed_where_it_cannot_be_written(engine, capsys, monkeypatch):
    def full(path, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("transfusion_jax.commands.evaluate.write_json", full)
    assert main(("evaluate", "run", "--out", "numbers.json")) == 1
    assert json.loads(capsys.readouterr().out)["text_accuracy"] == 1.0


def test_texts_of_data_do_nothing_to_a_terminal(capsys):
    ordinary = "bé\xa0\u732b\u3000\u0646\u200c\tx\nline"
    say(f"a \x1b[31mred\x9b0m\u202e {ordinary}")
    assert capsys.readouterr().out == f"a \\x1b[31mred\\x9b0m\\u202e {ordinary}\n"
    assert main(("sweep", "no\x1b[31m.py")) == 2
    assert "no\\x1b[31m.py" in capsys.readouterr().err


def test_evaluate_prints_json(engine, tmp_path, capsys, monkeypatch):
    file = tmp_path / "numbers.json"
    said = printed(capsys, "evaluate", str(tmp_path), "--out", str(file))
    assert (
        json.loads(said)
        == json.loads(file.read_text())
        == {
            "parameters": 0,
            "text_accuracy": 1.0,
            "text_accuracy_held_out": 1.0,
            "step": 40,
        }
    )
    asked = []

    def evaluate(engine, names, samples, report, rows):
        asked.append((names, samples, rows))
        return {"diverged": {"0-99": float("nan"), "all": [np.float64("inf"), 1.5]}}

    monkeypatch.setattr("transfusion_jax.evaluation.suite.evaluate", evaluate)
    said = printed(capsys, "evaluate", str(tmp_path), "--out", str(file))
    finite = {"diverged": {"0-99": None, "all": [None, 1.5]}, "step": 40}
    for text in (said, file.read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == finite
    asked.clear()
    for words in ((), ("--max-rows", "7"), ("--max-rows", "all"), ("--suite", "pairs")):
        printed(capsys, "evaluate", str(tmp_path), *words)
    samples = tmp_path / "samples"
    assert asked == [
        (("sums",), samples, 512),
        (("sums",), samples, 7),
        (("sums",), samples, None),
        (("pairs",), samples, 512),
    ]


def test_evaluate_refuses_what_it_cannot_measure(engine, tmp_path, capsys, monkeypatch):
    assert main(("evaluate", str(tmp_path), "--suite", "scenes")) == 2
    assert "suite 'scenes' judges pictures of" in capsys.readouterr().err
    none = replace(engine, experiment=replace(engine.experiment, evaluation=()))
    monkeypatch.setattr(engine_module, "load_engine", lambda *_: (none, 40))
    assert main(("evaluate", str(tmp_path))) == 0
    said = capsys.readouterr()
    assert "names no suite to run" in said.err
    assert json.loads(said.out).keys() == {"parameters", "step"}


def test_tables_keep_names_and_values_apart():
    summary = {"a": 1, "a_name_that_is_longer_than_any_column_was": 0.5, "none": None, "nested": {}}
    assert table(summary).splitlines() == [
        "  a                                          1",
        "  a_name_that_is_longer_than_any_column_was  0.5000",
        "  none                                       None",
    ]
    assert table({}) == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "memory is full: Unable to allocate 9 TiB"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand details"),
            "the memory of a device is full: RESOURCE_EXHAUSTED: Out of memory",
        ),
    ],
)
def test_full_memory_is_one_line(monkeypatch, capsys, error, message):
    def work(arguments: argparse.Namespace) -> int:
        raise error

    running(monkeypatch, work)
    assert main(("evaluate", "x")) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
