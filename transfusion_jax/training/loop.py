"""The training loop: dispatch a step, read the metrics of the one before, save, stop when asked."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from transfusion_jax.data.pipeline import read
from transfusion_jax.parallel.mesh import host_block
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.metrics import MetricsLog
from transfusion_jax.training.run import Run
from transfusion_jax.training.state import State
from transfusion_jax.training.step import Metrics, compiled_step
from transfusion_jax.training.watchdog import StopSignal, TrainingFailed, check_finite


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
        batches = read(run.data.batches(*host_block(sharding, rows)), start, run.experiment.data.prefetch)
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
            raise TrainingFailed(f"trained to step {int(state.step)}, but its checkpoint could not be saved")
        return Outcome(state, seconds(), stopped_by)


@dataclass(frozen=True)
class Work:
    """What the loop does at each step."""

    step: Callable[[Any, Any], tuple[Any, Metrics]]
    batches: Iterator[Any]
    save: Callable[[Any], None]
    after: Callable[[int, Any], None] = lambda step, state: None
    """Called with every step taken and its state."""


def take_steps(work: Work, state: Any, settings: Any, monitor: "Monitor", stop: StopSignal) -> tuple[Any, str | None]:
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
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch)


class Monitor:
    """Shows and logs what the steps report, and stops a run whose gradients stay non-finite."""

    def __init__(
        self, directory: Path, settings: Any, start: int, amount: int, unit: str,
        epochs: Callable[[int], dict[str, float]] = lambda step: {},
    ):  # fmt: skip
        """`settings` has the fields `steps`, `log_every` and `max_skipped_steps`; a step takes `amount` of `unit`.

        `epochs` says how often each source has been read by a step; that goes into the log.
        """
        self._epochs = epochs
        self._settings, self._main = settings, jax.process_index() == 0
        self._amount, self._unit = amount, unit
        self._log = MetricsLog(directory, start) if self._main else None
        self._bar = tqdm(
            total=self._settings.steps, initial=start, unit="step", desc="training", dynamic_ncols=True,
            disable=not self._main, mininterval=0.5,
        )  # fmt: skip
        self._since, self._since_step, self._waited = time.perf_counter(), start, 0.0

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._log:
            self._log.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as time that the step waited for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a finished step; blocks until it has finished."""
        if step % self._settings.log_every == 0 or step in (1, self._settings.steps):
            values = {name: float(value) for name, value in metrics.items()}
            now = time.perf_counter()
            elapsed, steps = now - self._since, step - self._since_step
            rate, wait = steps * self._amount / elapsed, self._waited / elapsed
            self._since, self._since_step, self._waited = now, step, 0.0
            row = {
                "step": step,
                **values,
                f"{self._unit}_per_second": round(rate, 1),
                "data_wait_share": round(wait, 5),
                **{f"epochs/{source}": round(read, 4) for source, read in self._epochs(step).items()},
            }
            if self._log:
                self._log.write(row)
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} {self._unit}/s", refresh=False)
        self._bar.update(step - self._bar.n)
        check_finite(step, int(metrics["skipped_in_a_row"]), self._settings.max_skipped_steps)
