"""What a run shows and logs of its steps."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from transfusion_jax.errors import Stopped
from transfusion_jax.host import bar_intervals
from transfusion_jax.parallel.processes import is_leader, leader_does
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.gauges import Gauges
from transfusion_jax.training.goodput import Account
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loss_watch import LossWatcher
from transfusion_jax.training.metrics import MetricsLog
from transfusion_jax.training.observation import Moved
from transfusion_jax.training.profile import Profiler
from transfusion_jax.training.settings import Settings
from transfusion_jax.training.update import Metrics
from transfusion_jax.training.watchdog import check_finite
from transfusion_jax.training.weights_and_biases import mirror


class Monitor:
    """Shows and logs the metrics of the steps, and stops a run whose gradients stay non-finite.

    `devices` are those of the mesh, against whose peak utilisation is measured.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        start: int,
        feed: Feed,
        instruments: Instruments | None = None,
        account: Account | None = None,
        devices: Sequence[Any] = (),
        report: Report = print,
    ):
        instruments = instruments or Instruments()
        self._settings = settings
        self._feed = feed
        self._observers = instruments.observers
        self._account = account or Account()
        self._report = report
        leader = is_leader()
        self._log = None
        if leader:
            self._log = MetricsLog(directory, start, report)
        if instruments.project:  # which may refuse the run; then no process starts it
            leader_does(lambda: self._log.copy_to(mirror(instruments.project, directory, report)))
        self._gauges = Gauges(feed, devices)
        self._profiler = Profiler(instruments.profile, directory / "profile", report)
        self._watcher = LossWatcher(instruments.loss_watch) if instruments.loss_watch else None
        self._bar = tqdm(
            total=settings.steps,
            initial=start,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not leader,
            **bar_intervals(),
        )
        self._observed: dict[int, dict[str, float]] = {}
        self._compiled = False
        self._since = time.perf_counter()
        self._since_step = start
        self._waited = 0.0

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._profiler.close()
        self._bar.close()
        if self._log:
            self._log.close()

    @contextlib.contextmanager
    def waiting(self, running: tuple[int, Metrics] | None = None) -> Iterator[None]:
        """Counts the time inside as time that the step waited for data.

        It counts against goodput only if the step that was running, if any, has ended by then.
        """
        self._account.charge("steps")
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        idle = running is None or running[1]["loss"].is_ready()
        self._account.charge("data" if idle else "steps")

    @contextlib.contextmanager
    def dispatching(self, step: int, batch: Any) -> Iterator[None]:
        """Around the dispatch of a step on a batch, which compiles the first one."""
        beside = contextlib.nullcontext() if self._compiled else self._beside("compiling")
        with beside, self._profiler.step(step):
            yield
        if self._log:  # the devices compute meanwhile
            self._gauges.dispatched(step, batch)
        if not self._compiled:
            self._compiled = True
            self._account.write()

    def observe(self, step: int, state: Any, moved: Moved) -> str | None:
        """Lets the observers that are due see the state after a step.

        Returns what stopped them, if `moved` raised Stopped; then nothing they saw is kept.
        """
        due = [seer for seer in self._observers if seer.due(step, self._settings.steps)]
        if not due:
            return None
        jax.block_until_ready(state.step)  # the step's own time is not the observers'
        try:
            with self._beside("validation"):
                seen = [observer.look(step, state, moved) for observer in due]
        except Stopped as stopped:
            self._report(f"validation and samples of step {step} were cut short and are left out")
            return stopped.by
        self._observed[step] = {name: v for s in seen for name, v in s.values.items()}
        for observation in seen if self._log else ():
            self._log.show(step, observation)
        return None

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the save of a checkpoint."""
        with self._beside("checkpoints"):
            yield
            self._account.saved(step)

    @contextlib.contextmanager
    def _beside(self, what: str) -> Iterator[None]:
        """Charges the time inside to `what`; the rates of steps leave it out."""
        begin = time.perf_counter()
        try:
            with self._account.during(what):
                yield
        finally:
            self._since += time.perf_counter() - begin

    def read(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step; blocks until the step has finished.

        Raises:
          TrainingFailed: too many steps in a row without finite gradients.
        """
        loss, skipped = jax.device_get((metrics["loss"], metrics["skipped_in_a_row"]))
        self._gauges.finished(step)
        self._profiler.finished(step)
        every = step % self._settings.log_every == 0
        observed = self._observed.pop(step, {})
        if every or step in (1, self._settings.steps) or observed:
            self._show(step, {name: float(value) for name, value in metrics.items()} | observed)
        self._bar.update(step - self._bar.n)
        self._watch(step, float(loss), int(skipped))
        check_finite(step, int(skipped), self._settings.max_skipped_steps)

    def _watch(self, step: int, loss: float, skipped: int) -> None:
        """Names what is odd about the loss of a step."""
        if self._log and self._watcher:
            watch = self._watcher.watch
            for event in self._watcher.read(step, loss, skipped > 0):
                self._log.note(event.row(watch))
                if skipped <= 1:  # of steps in a row without finite gradients, the first
                    self._report(event.line(watch))

    def _show(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        elapsed = now - self._since
        rate = (step - self._since_step) * self._feed.amount / elapsed
        wait = self._waited / elapsed
        unit = self._feed.unit
        epochs = {f"epochs/{name}": round(n, 4) for name, n in self._feed.epochs(step).items()}
        if self._log:
            rates = {f"{unit}_per_second": round(rate, 1), "data_wait_share": round(wait, 5)}
            gauges = self._gauges.row(step - self._since_step, elapsed)
            goodput = {"goodput": self._account.summary()["goodput"]}
            self._log.write({"step": step, **values, **rates, **gauges, **goodput, **epochs})
        self._since = now
        self._since_step = step
        self._waited = 0.0
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} {unit}/s", refresh=False)
