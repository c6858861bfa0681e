"""The training loop: dispatch a step, read the metrics of the one before, save, stop when asked."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from tqdm import tqdm

from transfusion_jax.batch import Batch
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
        start = saved = int(state.step)
        begin = time.perf_counter() - run.train_seconds
        seconds = lambda: time.perf_counter() - begin  # noqa: E731
        if start >= settings.steps:
            return Outcome(state, run.train_seconds, None)

        step_fn, sharding = compiled_step(run.blueprint), batch_sharding(run.mesh)
        block, blocks = host_block(sharding, run.experiment.data.batch_rows)
        batches = read(run.data.batches(block, blocks), start, run.experiment.data.prefetch)
        stopped_by, pending = None, None
        with Monitor(run, start) as monitor:
            for step in range(start + 1, settings.steps + 1):
                with monitor.waiting():
                    batch = next(batches)
                batch = _on_devices(batch, sharding, run.experiment.data.batch_rows)
                state, metrics = step_fn(state, batch)
                if pending is not None:
                    monitor.read(*pending)
                pending = step, metrics
                stopped_by = stop.requested(step)
                if step % settings.checkpoint_every == 0 or step == settings.steps or stopped_by:
                    monitor.read(*pending)
                    pending = None
                    run.checkpoints.save(state, {"train_seconds": seconds(), "data": run.data.fingerprint()})
                    saved = step
                if stopped_by:
                    break
        if not run.checkpoints.wait():
            raise TrainingFailed(f"trained to step {saved}, but its checkpoint could not be saved")
        return Outcome(state, seconds(), stopped_by)


def _on_devices(batch: Batch, sharding: jax.sharding.NamedSharding, rows: int) -> Batch:
    """This process's part of a batch, as part of the global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), batch)


class Monitor:
    """Shows and logs what the steps report, and stops a run whose gradients stay non-finite."""

    def __init__(self, run: Run, start: int):
        self._settings, self._main = run.experiment.train, jax.process_index() == 0
        self._tokens = run.experiment.data.batch_rows * run.experiment.data.row_length
        self._log = MetricsLog(run.directory, start) if self._main else None
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
            rate, wait = steps * self._tokens / elapsed, self._waited / elapsed
            self._since, self._since_step, self._waited = now, step, 0.0
            row = {"step": step, **values, "tokens_per_second": round(rate, 1), "data_wait_share": round(wait, 5)}
            if self._log:
                self._log.write(row)
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate / 1000:.1f}k tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)
        check_finite(step, int(metrics["skipped_in_a_row"]), self._settings.max_skipped_steps)
