"""The training loop: dispatch a step, read the metrics of the one before, save, stop when asked."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from transfusion_jax.data.pipeline import read
from transfusion_jax.parallel.mesh import host_block
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.run import Run
from transfusion_jax.pretraining.state import State
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.monitor import Monitor
from transfusion_jax.training.update import Metrics
from transfusion_jax.training.watchdog import StopSignal, TrainingFailed


@dataclass(frozen=True)
class Outcome:
    state: State
    seconds: float
    """Of training, over all its restarts."""
    stopped_by: str | None
    """The signal that ended it early."""


def train(run: Run, report: Report) -> Outcome:
    """Trains to the last step, or until a signal asks to stop; either way the state is saved.

    Raises:
      TrainingFailed: too many steps in a row without finite gradients, or the final checkpoint was not written.
    """
    settings = run.experiment.train
    with jax.set_mesh(run.mesh), StopSignal() as stop:
        state = run.blueprint.initialise() if run.state is None else run.state
        start = int(state.step)
        begin = time.perf_counter() - run.train_seconds
        seconds = lambda: time.perf_counter() - begin  # noqa: E731
        if start >= settings.steps:
            return Outcome(state, run.train_seconds, None)

        step_fn, sharding = compiled_step(run.blueprint), batch_sharding(run.mesh)
        rows = run.experiment.data.batch_rows
        batches = read(
            run.data.batches(*host_block(sharding, rows)), start, run.experiment.data.prefetch
        )
        work = Work(
            step=lambda state, batch: step_fn(state, on_devices(batch, sharding, rows)),
            batches=batches,
            save=lambda state: run.checkpoints.save(
                state, {"train_seconds": seconds(), "data": run.data.fingerprints()}
            ),
        )
        amount = rows * run.experiment.data.row_length
        with Monitor(run.directory, settings, start, amount, "tokens", run.data.epochs) as monitor:
            state, stopped_by = take_steps(work, state, settings, monitor, stop)
        if not run.checkpoints.wait():
            raise TrainingFailed(
                f"trained to step {int(state.step)}, but its checkpoint could not be saved"
            )
        return Outcome(state, seconds(), stopped_by)


@dataclass(frozen=True)
class Work:
    """What the loop does at each step."""

    step: Callable[[Any, Any], tuple[Any, Metrics]]
    batches: Iterator[Any]
    save: Callable[[Any], None]
    after: Callable[[int, Any], None] = lambda step, state: None
    """Called with every step taken and its state."""


def take_steps(
    work: Work, state: Any, settings: Any, monitor: "Monitor", stop: StopSignal
) -> tuple[Any, str | None]:
    """Goes on from `state` to step `settings.steps`; returns the last state, saved, and the signal that ended it early.

    `settings` has the fields `steps` and `checkpoint_every`.
    """
    stopped_by, pending = None, None
    for step in range(int(state.step) + 1, settings.steps + 1):
        with monitor.waiting():
            batch = next(work.batches)
        state, metrics = work.step(state, batch)
        if pending is not None:
            monitor.read(*pending)
        pending = step, metrics
        stopped_by = stop.requested(step)
        if step % settings.checkpoint_every == 0 or step == settings.steps or stopped_by:
            monitor.read(*pending)
            pending = None
            work.save(state)
        work.after(step, state)
        if stopped_by:
            break
    return state, stopped_by


def on_devices(batch: Any, sharding: jax.sharding.NamedSharding, rows: int) -> Any:
    """This process's part of a batch, as part of the global arrays."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch
    )
