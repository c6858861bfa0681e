"""The training machine, driven by the smallest trainer there is (line.py)."""

import math
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import line
import numpy as np
import pytest

from transfusion_jax.errors import ComeAgain
from transfusion_jax.training import loop
from transfusion_jax.training.checkpoint import Checkpoints
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import train
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.monitor import Monitor
from transfusion_jax.training.observation import Observation, Observer
from transfusion_jax.training.watchdog import TrainingFailed, Watch

LINE = line.Line()


def trained(directory, experiment=LINE):
    said = []
    outcome = train(line.open_run(experiment, directory, said.append), said.append)
    return outcome, said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "line"
    return directory, *trained(directory)


def losses(directory):
    return [(row["step"], row["loss"], row["learning_rate"]) for row in read_metrics(directory)]


def test_a_run_learns_logs_saves_and_says_so(uninterrupted):
    directory, outcome, said = uninterrupted
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert {"points_per_second", "data_wait_share", "skipped"} <= set(rows[0])
    assert int(outcome.state.step) == 12 and outcome.stopped_by is None and outcome.seconds > 0
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"5", "10", "12"}
    assert "line: two parameters" in said[0] and "12 of 12 steps of 8 points" in said[0]
    assert said[-1].startswith("trained 12 steps in")


def test_stopped_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        outcome, said = trained(tmp_path / "line")
    assert outcome.stopped_by == "SIGTERM" and int(outcome.state.step) == 7
    assert said[-1].startswith("stopped by SIGTERM at step 7, saved")
    said = []
    run = line.open_run(LINE, tmp_path / "line", said.append)
    assert 0 < run.directory.train_seconds <= outcome.seconds  # less the time of the last save
    resumed = train(run, said.append)
    assert "resuming from checkpoint" in said[0] and "5 of 12 steps" in said[1]
    assert losses(tmp_path / "line") == losses(uninterrupted[0])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, uninterrupted[1].state)
    assert resumed.seconds > run.directory.train_seconds


def test_seconds_of_training_are_added_over_restarts(tmp_path):
    run = line.open_run(LINE, tmp_path / "line", lambda said: None)
    run = replace(run, directory=replace(run.directory, train_seconds=1000.0))
    assert 1000 < train(run, lambda said: None).seconds < 1100


def test_step_s_reads_batch_s(tmp_path, monkeypatch):
    """Counted from 0, also after a restart."""
    batches = line.points(LINE)
    seen = []
    for stop in (4, None):
        run = line.open_run(LINE, tmp_path / "line", lambda said: None)

        def step(state, batch, run=run):
            np.testing.assert_array_equal(batch, batches[int(state.step)])
            seen.append(int(state.step))
            return run.step(state, batch)

        monkeypatch.setattr(Watch, "moved", line.signal_at(stop))
        train(replace(run, step=step), lambda said: None)
    assert seen == list(range(12))


def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path):
    directory, outcome, _ = uninterrupted
    before = (directory / "metrics.jsonl").read_text()
    again, said = trained(directory)
    assert (directory / "metrics.jsonl").read_text() == before
    assert 0 < again.seconds <= outcome.seconds  # the last save is not in it
    assert "0 of 12 steps" in said[1]
    jax.tree.map(np.testing.assert_array_equal, again.state, outcome.state)


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
    """Step n + 1 is dispatched before the metrics of step n are read; a save reads its own."""
    events = []
    read = Monitor.read

    def noted(self, step, metrics):
        events.append(f"read {step}")
        read(self, step, metrics)

    monkeypatch.setattr(Monitor, "read", noted)
    experiment = replace(LINE, train=replace(LINE.train, steps=4, checkpoint_every=3))
    run = line.open_run(experiment, tmp_path / "line", events.append)

    def step(state, batch):
        events.append("step")
        return run.step(state, batch)

    def look(number, state, moved):
        events.append(f"look {number}")
        return Observation()

    del events[:]
    instruments = Instruments(observers=(Observer(2, look),))
    train(replace(run, step=step, instruments=instruments), lambda said: None)
    assert events == [
        *("step", "step", "read 1", "look 2", "step", "read 2", "read 3"),
        *("step", "look 4", "read 4"),
    ]
    assert run.step._cache_size() == 1  # compiled once


def test_observers_stop_where_all_processes_do(uninterrupted, tmp_path, monkeypatch):
    """The agreement names one point only, which may lie inside an observation."""
    run = line.open_run(LINE, tmp_path / "line", print)
    looked = []

    def look(step, state, moved):
        for _ in range(3):
            moved()
            looked.append(step)
        return Observation(values={"seen": 1.0})

    instruments = Instruments(observers=(Observer(4, look), Observer(4, look)))
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(1 + 7 + 3 * 2 + 4))  # in the second, step 8
        outcome = train(replace(run, instruments=instruments), said.append)
    assert outcome.stopped_by == "SIGTERM" and int(outcome.state.step) == 8
    assert looked == [4] * 6 + [8] * 4
    assert "validation and samples of step 8 were cut short and are left out" in said
    rows = read_metrics(tmp_path / "line")
    assert [row["step"] for row in rows if "seen" in row] == [4] and rows[-1]["step"] == 8
    trained(tmp_path / "line")
    assert losses(tmp_path / "line") == losses(uninterrupted[0])


def test_rates_are_since_the_last_logged_step(tmp_path, monkeypatch):
    """Of a resumed run, by a clock that is set by hand; without the time of checkpoints."""
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("transfusion_jax.training.monitor.time", clock)
    feed = line.open_run(LINE, tmp_path / "line", lambda said: None).feed
    settings = replace(LINE.train, log_every=3)
    metrics = {"loss": 1.0, "skipped_in_a_row": 0}
    with Monitor(tmp_path / "line", settings, 4, feed) as monitor:
        for step in range(5, 10):
            with monitor.waiting():
                now[0] += 0.25
            now[0] += 1.75
            monitor.read(step, metrics)
            with monitor.saving(step):
                now[0] += 100
    rows = read_metrics(tmp_path / "line")
    assert [row["step"] for row in rows] == [6, 9]
    assert [row["points_per_second"] for row in rows] == [8 / 2, 8 / 2]
    assert [row["data_wait_share"] for row in rows] == [0.125, 0.125]


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(tmp_path, monkeypatch):
    save = Checkpoints.save

    def full(self, state, progress):
        if int(state.step) < 12:
            return save(self, state, progress)
        self.wait()
        self._failed(12, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    said = []
    run = line.open_run(LINE, tmp_path / "line", said.append)
    with pytest.raises(TrainingFailed, match="trained to step 12, but its checkpoint"):
        train(run, said.append)
    assert "the last good one is step 10" in said[-1]


@pytest.mark.parametrize(("asked", "error"), [("continue", ComeAgain), ("stop", TrainingFailed)])
def test_a_stop_that_cannot_be_saved_may_be_resumed_from_before(
    uninterrupted, tmp_path, monkeypatch, asked, error
):
    experiment = replace(LINE, train=replace(LINE.train, failed_save=asked))
    wait = Checkpoints.wait

    def full(self):
        if self._saving and self._saving[0] == 7:
            self._saving = 7, OSError(28, "No space left on device")
        return wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(7))
        patch.setattr(Checkpoints, "wait", full)
        with pytest.raises(error, match="step 7, .*could not be saved") as raised:
            trained(tmp_path / "line", experiment)
    assert type(raised.value) is error
    shutil.rmtree(tmp_path / "line" / "checkpoints" / "7", ignore_errors=True)
    trained(tmp_path / "line", experiment)
    assert losses(tmp_path / "line") == losses(uninterrupted[0])


def test_gradients_that_stay_non_finite_end_the_run(tmp_path):
    with pytest.raises(TrainingFailed, match="stopped at step 3: 3 steps in a row"):
        trained(tmp_path / "line", replace(LINE, slope=math.nan))


def test_a_signal_after_a_ctrl_c_does_not_interrupt():
    with Watch() as watch:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert watch.moved() == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.moved() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_one_of_several_processes_fails_without_waiting_for_the_others(tmp_path, monkeypatch):
    run = line.open_run(LINE, tmp_path / "line", print)
    closed = []
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append("closed"))
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(Watch, "moved", lambda self: None)

    def step(state, batch):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        train(replace(run, step=step), print)
    assert closed == []
