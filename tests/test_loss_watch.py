"""What is odd about a loss, found in losses that are made up; and noted by real runs."""

import math
from dataclasses import replace

import line
import numpy as np
import pytest

from transfusion_jax.config import Experiment, PhaseConfig
from transfusion_jax.pretraining.run import loss_watch
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import train
from transfusion_jax.training.loss_watch import LossWatch, LossWatcher
from transfusion_jax.training.metrics import read_events
from transfusion_jax.training.watchdog import TrainingFailed, Watch

WATCH = LossWatch(spike_window=20, spike_deviations=12.0, stall_steps=50, seed=3, rows=8)


def noisy(steps: int, slope: float = -0.01) -> list[float]:
    noise = np.random.default_rng(0).normal(0, 0.05, steps)
    return [float(5 + slope * s + noise[s]) for s in range(steps)]


def found(losses, watch=WATCH, skipped=()) -> list[tuple[int, str]]:
    watcher = LossWatcher(watch)
    events = [e for s, x in enumerate(losses, 1) for e in watcher.read(s, x, s in skipped)]
    return [(event.step, event.kind) for event in events]


def test_a_loss_that_falls_with_noise_is_not_odd():
    assert found(noisy(300)) == []


@pytest.mark.parametrize(("factor", "named"), [(1.1, False), (2.0, True)])
def test_a_spike_is_named_once(factor, named):
    losses = noisy(200)
    losses[120:123] = [x * factor for x in losses[120:123]]
    losses[150] *= factor
    assert found(losses) == ([(121, "spike"), (151, "spike")] if named else [])


def test_a_spike_is_measured_against_noise_and_not_only_the_median():
    losses = [x + 2 * math.sin(37 * s) for s, x in enumerate(noisy(100))]
    losses[80] = 10.0
    assert found(losses) == []
    calm = noisy(100)
    calm[80] = 10.0
    assert found(calm) == [(81, "spike")]


def test_half_a_window_must_be_known():
    assert found([*noisy(9), 50.0, *noisy(60)[10:]]) == []
    assert found([*noisy(10), 50.0, *noisy(60)[11:]]) == [(11, "spike")]


def test_losses_of_another_mixture_are_not_compared():
    losses = noisy(60) + [x + 5 for x in noisy(60)]
    assert found(losses) == [(61, "spike")]
    assert found(losses, replace(WATCH, changes=frozenset({61}))) == []
    data = Experiment(name="e").data
    phases = (PhaseConfig(0.5, (1.0,) * len(data.sources)),)
    experiment = Experiment(name="e", data=replace(data, phases=phases))
    # Batch s, counted from 0, is that of step s + 1.
    assert loss_watch(experiment).changes == {experiment.train.steps // 2 + 1}


def test_a_loss_that_stops_falling_is_named_after_two_blocks():
    losses = noisy(100) + [x - 0.6 for x in noisy(250, slope=0)]
    assert found(losses) == [(200, "stall")]
    assert found(losses, replace(WATCH, stall_steps=0)) == []


def test_a_constant_loss_is_named_and_then_left_alone():
    assert found([2.0] * 45) == [(21, "stall")]


def test_what_is_not_finite_is_named_and_not_remembered():
    losses = noisy(100)
    losses[50] = math.nan
    losses[60] = math.inf
    assert found(losses, skipped=(51, 61, 71)) == [
        (51, "not_finite"),
        (61, "not_finite"),
        (71, "not_finite"),
    ]


def test_an_event_names_the_rows_of_its_batch():
    watcher = LossWatcher(WATCH)
    events = [e for s, x in enumerate([*noisy(30), 9.0], 1) for e in watcher.read(s, x, False)]
    row = events[0].row(WATCH)
    assert (row["step"], row["seed"], row["first_row"], row["last_row"]) == (31, 3, 240, 247)
    assert row["loss"] == 9.0 and row["bound"] < 9.0
    said = events[0].line(WATCH)
    assert said.startswith("spike at step 31: loss 9 is above")
    assert (
        "rows 240 to 247 of seed 3 (transfusion-jax inspect EXPERIMENT --run-dir RUN --row 240)"
        in said
    )


def watched(directory, experiment):
    run = line.open_run(experiment, directory, lambda said: None)
    watch = replace(WATCH, spike_window=4, spike_deviations=0.5)
    return replace(run, instruments=Instruments(loss_watch=watch))


def test_a_run_notes_them_and_a_resumed_run_no_step_twice(tmp_path, monkeypatch):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(8))
        train(watched(tmp_path, line.Line()), said.append)
    assert read_events(tmp_path) and "at step" in " ".join(said)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 9, "kind": "spike"}\n{"st')  # of a process that was killed later
    train(watched(tmp_path, line.Line()), said.append)
    steps = [event["step"] for event in read_events(tmp_path)]
    assert len(steps) == len(set(steps)) and max(steps) <= 12
    assert all("first_row" in event for event in read_events(tmp_path))


def test_gradients_that_stay_non_finite_are_noted_each_and_said_once(tmp_path):
    said = []
    with pytest.raises(TrainingFailed):
        train(watched(tmp_path, replace(line.Line(), slope=math.nan)), said.append)
    assert [(e["step"], e["kind"], e["loss"]) for e in read_events(tmp_path)] == [
        (step, "not_finite", None) for step in (1, 2, 3)
    ]
    assert len([words for words in said if "not finite at step" in words]) == 1
