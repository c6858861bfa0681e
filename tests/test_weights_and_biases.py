"""Weights & Biases, in whose place a module notes what it is told."""

import json
import sys
from dataclasses import replace

import line
import numpy as np
import pytest

from transfusion_jax.errors import WorkFailed
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import train
from transfusion_jax.training.observation import Observation, Observer
from transfusion_jax.training.watchdog import Watch
from transfusion_jax.training.weights_and_biases import Project

FAKE = """
told = []

class Error(Exception):
    pass

class Run:
    def define_metric(self, name, **options):
        told.append(("define", name, options))

    def log(self, row):
        told.append(("log", row))

    def finish(self):
        told.append(("finish",))

def Image(pixels):
    return ("picture", pixels.shape, str(pixels.dtype))

def init(**options):
    told.append(("init", options))
    if options["project"] == "closed":
        raise Error("permission denied")
    return Run()
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb.told
    del sys.modules["wandb"]


def shown(directory, name="digits"):
    look = Observer(
        6, lambda step, state, moved: Observation(pictures={"seen": np.zeros((4, 4, 1), np.uint8)})
    )
    instruments = Instruments((look,), project=Project(name, "mine", {"train": {"steps": 12}}))
    said = []
    run = line.open_run(line.Line(), directory, said.append)
    train(replace(run, instruments=instruments), said.append)
    return said


def test_rows_and_pictures_go_there_and_a_restart_continues_the_run(told, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        shown(tmp_path / "run")
    shown(tmp_path / "run")
    first, second = (call[1] for call in told if call[0] == "init")
    assert first == second and first["id"] == (tmp_path / "run" / "wandb_id").read_text()
    assert first["project"] == "digits" and first["name"] == "mine" and first["resume"] == "allow"
    assert first["config"] == {"train": {"steps": 12}} and first["dir"] == str(tmp_path / "run")
    assert ("define", "*", {"step_metric": "step"}) in told and told[-1] == ("finish",)
    logged = [call[1] for call in told if call[0] == "log"]
    pictures = [row for row in logged if "seen" in row]
    assert [row["step"] for row in pictures] == [6, 12]
    assert pictures[0]["seen"] == ("picture", (4, 4, 1), "uint8")
    rows = [row for row in logged if "loss" in row]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert rows == [json.loads(text) for text in lines]


def test_a_service_that_refuses_is_one_line(told, tmp_path):
    with pytest.raises(WorkFailed, match="Weights & Biases: permission denied"):
        shown(tmp_path / "run", "closed")


@pytest.mark.parametrize("kind", ["Error", "ConnectionError"])
def test_a_run_that_is_there_goes_on_where_the_service_cannot_be_reached(
    told, tmp_path, monkeypatch, kind
):
    import wandb

    def unreachable(**options):
        raise getattr(wandb, kind, ConnectionError)("timed out")

    reached = wandb.init
    monkeypatch.setattr(wandb, "init", unreachable)
    for _ in range(2):  # a first start that was refused has left no run there
        with pytest.raises(WorkFailed, match="Weights & Biases: timed out"):
            shown(tmp_path / "run")
    monkeypatch.setattr(wandb, "init", reached)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        shown(tmp_path / "run")
    monkeypatch.setattr(wandb, "init", unreachable)
    said = shown(tmp_path / "run")
    assert said.count("Weights & Biases: timed out; this start is not shown there") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [*range(1, 13)]


def test_a_service_that_fails_later_is_told_and_training_goes_on(told, tmp_path, monkeypatch):
    def failing(self, row):
        raise ConnectionError("gone")

    import wandb

    monkeypatch.setattr(wandb.Run, "log", failing)
    monkeypatch.setattr(wandb.Run, "finish", lambda self: failing(self, {}))
    said = []
    instruments = Instruments(project=Project("digits", "mine", {}))
    run = line.open_run(line.Line(), tmp_path / "run", said.append)
    outcome = train(replace(run, instruments=instruments), said.append)
    assert int(outcome.state.step) == 12
    assert len([text for text in said if "to Weights & Biases (gone)" in text]) == 1


def test_without_the_package_a_project_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train.wandb_project='digits' needs"):
        Project("digits", "mine", {})
