"""A run with all its instruments: what they leave, and that training does not feel them."""

import functools
import io
import json
import signal
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import line
import numpy as np
import pytest
from exported import a_tokenizer
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from transfusion_jax.commands.instruments import equipped
from transfusion_jax.commands.main import main
from transfusion_jax.config import MeshConfig
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.pipeline import Data
from transfusion_jax.evaluation.samples import sampler
from transfusion_jax.generation.engine import Engine, load_engine
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.planning.plan import abstract_batch
from transfusion_jax.pretraining.run import open_run
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.pretraining.validation import Validation
from transfusion_jax.training.loop import train
from transfusion_jax.training.metrics import MetricsLog, read_events, read_metrics
from transfusion_jax.training.observation import nothing
from transfusion_jax.training.profile import Window
from transfusion_jax.training.watchdog import Watch

STEPS = 8
PROMPTS = ("three plus four is", "two plus")
VALIDATION = {
    "validation/digits/image_loss",
    "validation/digits/text_loss",
    "validation/sums/text_loss",
}
LOSSES = ("step", "loss", "text_loss", "image_loss", "grad_norm", "learning_rate")


def silent(said: str) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two of the eight devices; and all runs share one compiled step, which instruments are no part
    of."""
    steps = []

    def first(planned):
        steps.append(steps[0] if steps else compiled_step(planned))
        return steps[0]

    two = functools.partial(make_mesh, devices=jax.devices()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transfusion_jax.pretraining.run.make_mesh", two)
        patch.setattr("transfusion_jax.pretraining.run.compiled_step", first)
        yield


@pytest.fixture(scope="module")
def plain(experiment):
    model = replace(experiment.model, layers=1, width=32, heads=2, kv_heads=2, mlp_width=32)
    train = replace(experiment.train, steps=STEPS, checkpoint_every=100, ema_decay=0.5)
    sampler = replace(experiment.sampler, max_tokens=20, steps=2)
    mesh = MeshConfig(data=1, fsdp=2)
    return replace(experiment, model=model, train=train, sampler=sampler, mesh=mesh)


@pytest.fixture(scope="module")
def watched(plain):
    train = replace(
        plain.train,
        validate_every=3,
        validation_rows=4,
        sample_every=5,
        sample_prompts=PROMPTS,
        spike_window=2,
        spike_deviations=0.01,
        log_every=4,
    )
    return replace(plain, train=train)


def trained(experiment, directory: Path, window: Window | None = None) -> list[str]:
    said = []
    train(
        equipped(open_run(experiment, directory, silent), experiment, window, silent), said.append
    )
    return said


@pytest.fixture(scope="module")
def whole(watched, tmp_path_factory):
    """The run with all instruments, profiled, and what it said."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return directory, trained(watched, directory, Window(6, 7))


def board(directory: Path) -> list:
    """The values in TensorBoard's event files: (step, value)."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value) for value in event.summary.value]
            data = data[16 + size :]
    return found


@pytest.mark.long
def test_a_plain_run_that_is_resumed_with_validation_sees_the_same(
    plain, watched, whole, tmp_path, monkeypatch
):
    """So training does not feel its instruments, and what they measure survives a restart."""
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(4))
        trained(plain, tmp_path / "run")
    trained(replace(watched, train=replace(watched.train, sample_every=0)), tmp_path / "run")

    def learned(directory):
        return {
            row["step"]: {k: v for k, v in row.items() if k in LOSSES or k in VALIDATION}
            for row in read_metrics(directory)
        }

    ours = learned(tmp_path / "run")
    theirs = learned(whole[0])
    assert set(ours) == {1, 2, 3, 4, 6, 8} and set(theirs) == {1, 3, 4, 6, 8}
    assert ours[6] == theirs[6] and ours[8] == theirs[8] and VALIDATION <= set(ours[8])
    assert ours[4] == theirs[4] and not VALIDATION & set(ours[4])


@pytest.mark.long
@pytest.mark.parametrize(
    ("owner", "name", "step"), [(Validation, "measure", 3), (Engine, "stream", 5)]
)
def test_a_signal_cuts_instruments_short_and_training_does_not_feel_it(
    watched, whole, tmp_path, monkeypatch, owner, name, step
):
    original = getattr(owner, name)

    def struck(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        said = trained(watched, tmp_path / "run")
    assert f"validation and samples of step {step} were cut short and are left out" in said
    assert said[-1].startswith(f"stopped by SIGTERM at step {step}, saved")
    assert not VALIDATION & set(read_metrics(tmp_path / "run")[-1])
    trained(watched, tmp_path / "run")
    assert all(at != step or "samples" not in value.tag for at, value in board(tmp_path / "run"))
    ours, theirs = (
        {row["step"]: {name: row[name] for name in LOSSES} for row in read_metrics(directory)}
        for directory in (tmp_path / "run", whole[0])
    )
    for shared in ours.keys() & theirs.keys() | {6, 8}:
        assert ours[shared] == theirs[shared]


def test_validation_is_logged_where_it_is_due(whole):
    for row in read_metrics(whole[0]):
        assert set(row) & VALIDATION == (VALIDATION if row["step"] in (3, 6, 8) else set())
    shown = {(step, value.tag) for step, value in board(whole[0])}
    assert {(step, name) for step in (3, 6, 8) for name in VALIDATION} <= shown


def test_samples_are_what_generate_answers(watched, whole):
    engine, step = load_engine(whole[0], silent)
    assert step == STEPS
    texts = [
        (at, value.tag, value.tensor.string_val[0].decode())
        for at, value in board(whole[0])
        if value.tag.startswith("samples/") and value.tensor.string_val
    ]
    assert [(at, tag.removesuffix("/text_summary")) for at, tag, _ in texts] == [
        (at, f"samples/{n}") for at in (5, STEPS) for n in (0, 1)
    ]
    for n, spans in enumerate(engine.generate([[prompt] for prompt in PROMPTS])):
        words = [span if isinstance(span, str) else "[image]" for span in spans]
        assert texts[2 + n][2] == f"{PROMPTS[n]} -> {' '.join(words)}"


def test_pictures_of_samples_are_shown(watched, whole, tmp_path, monkeypatch):
    """What a model answers with pictures, which this one does not."""
    picture = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    answers = [["seven", picture, "it is", -picture], ["eight"]]
    monkeypatch.setattr(Engine, "with_weights", lambda engine, weights, moved: engine)
    monkeypatch.setattr(Engine, "generate", lambda *_: answers)
    observer = sampler(watched, whole[0], make_mesh(watched.mesh, jax.devices()[:2]), silent)
    log = MetricsLog(tmp_path, 0)
    log.show(5, observer.look(5, SimpleNamespace(ema={}), nothing))
    log.close()
    values = {value.tag: value for step, value in board(tmp_path) if step == 5}
    assert b"seven [image] it is [image]" in values["samples/0/text_summary"].tensor.string_val[0]
    for i, expected in enumerate((picture, -picture)):
        with Image.open(io.BytesIO(values[f"samples/0/{i}"].image.encoded_image_string)) as shown:
            seen = np.asarray(shown.convert("L")) / 127.5 - 1
        np.testing.assert_allclose(seen, expected[..., 0], atol=1 / 127)


def test_a_prompt_longer_than_a_row_is_refused(watched, tmp_path):
    prompts = ("one two three four five " * 40,)
    long = replace(watched, train=replace(watched.train, sample_prompts=prompts))
    with pytest.raises(ValueError, match="row"):
        trained(long, tmp_path / "run")


def test_a_suite_that_cannot_measure_the_run_is_refused_before_it(watched, tmp_path, monkeypatch):
    """`check_experiment` knows the pictures of built-in sources alone."""
    with pytest.raises(ValueError, match="suite 'scenes' judges pictures of 32x32x3 or 64x64x3"):
        trained(replace(watched, evaluation=("scenes",)), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_finished_run_keeps_its_numbers_where_other_suites_cannot_be(plain, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    written = {"config.json": dumps(plain), "summary.json": "{}", "tokenizer.model": None}
    for name, text in written.items():
        (run / name).write_bytes(text.encode() if text else a_tokenizer().model)
    (tmp_path / "own.py").write_text(
        "from transfusion_jax.config.stored import loads\n"
        f"def config(): return loads({dumps(plain)!r}, 'own')\n"
    )
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    words = ["train", str(tmp_path / "own.py"), "--run-dir", str(run), "--evaluation", "pairs"]
    with pytest.MonkeyPatch.context() as patch:
        unmeasurable = "suite 'pairs' cannot"

        def refuse(*_):
            raise ValueError(unmeasurable)

        patch.setattr("transfusion_jax.commands.instruments.check_suites", refuse)
        patch.setattr("transfusion_jax.commands.instruments.make_mesh", lambda _: one_device())
        assert main(words) == 2
    assert unmeasurable in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


SCOPES = ("block/attention/", "block/mlp/", "jvp(text_loss)/", "jvp(image_loss)/", "/update/")


def test_the_lowered_step_holds_the_named_scopes(plain):
    mesh = make_mesh(plain.mesh, jax.devices()[:2])
    planned = blueprint(plain, mesh)
    with jax.set_mesh(mesh):
        lowered = compiled_step(planned).lower(planned.abstract, abstract_batch(plain, mesh))
    text = lowered.as_text(debug_info=True)
    assert all(scope in text for scope in SCOPES)


def test_a_profile_holds_the_named_scopes(whole):
    directory, said = whole
    (trace,) = (directory / "profile").rglob("*.xplane.pb")
    held = trace.read_bytes()
    for scope in SCOPES:
        assert scope.encode() in held, scope
    assert any(f"profiled steps 6 to 7 into {directory / 'profile'}" in line for line in said)


def test_a_spike_is_named_with_rows_that_inspect_shows(
    watched, whole, tokenizer, tmp_path, monkeypatch, capsys
):
    directory, said = whole
    event = read_events(directory)[0]
    assert event["kind"] == "spike" and event["seed"] == watched.train.seed
    rows, batch = watched.data.batch_rows, event["step"] - 1
    assert (event["first_row"], event["last_row"]) == (batch * rows, batch * rows + rows - 1)
    assert any(f"spike at step {event['step']}" in line for line in said)
    data = Data(watched, tokenizer)
    trained_on = data.batches()[batch]
    for n, number in enumerate(range(event["first_row"], event["last_row"] + 1)):
        np.testing.assert_array_equal(data.rows()[number].tokens_BL, trained_on.tokens_BL[n])
    monkeypatch.chdir(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    Path("small.py").write_text(EXPERIMENT.format(text=json.dumps(json.dumps(config))))
    command = ["inspect", "small.py", "--run-dir", str(directory), "--row"]
    assert main([*command, str(event["first_row"]), "--out", "row.png"]) == 0
    assert Path("row.png").exists() and f"row {event['first_row']}" in capsys.readouterr().out
    assert main([*command, "0", "--train.seed", "5"]) == 2
    assert "train.seed: 0 -> 5" in capsys.readouterr().err


EXPERIMENT = """
from transfusion_jax.config.stored import loads

def config():
    return loads({text}, "small")
"""
