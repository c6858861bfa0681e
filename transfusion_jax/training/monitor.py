"""What a run shows and logs of its steps."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from transfusion_jax.parallel.processes import is_leader
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.metrics import MetricsLog
from transfusion_jax.training.settings import Settings
from transfusion_jax.training.update import Metrics
from transfusion_jax.training.watchdog import check_finite


class Monitor:
    """Shows and logs the metrics of the steps, and stops a run whose gradients stay non-finite."""

    def __init__(self, directory: Path, settings: Settings, start: int, feed: Feed):
        self._settings = settings
        self._feed = feed
        leader = is_leader()
        self._log = MetricsLog(directory, start) if leader else None
        self._bar = tqdm(
            total=settings.steps,
            initial=start,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not leader,
            mininterval=0.5,
        )
        self._since = time.perf_counter()
        self._since_step = start
        self._waited = 0.0

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
        """Takes the metrics of a step; blocks until the step has finished.

        Raises:
          TrainingFailed: too many steps in a row without finite gradients.
        """
        if step % self._settings.log_every == 0 or step in (1, self._settings.steps):
            self._show(step, {name: float(value) for name, value in metrics.items()})
        self._bar.update(step - self._bar.n)
        check_finite(step, int(metrics["skipped_in_a_row"]), self._settings.max_skipped_steps)

    def _show(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        elapsed = now - self._since
        rate = (step - self._since_step) * self._feed.amount / elapsed
        wait = self._waited / elapsed
        self._since = now
        self._since_step = step
        self._waited = 0.0
        unit = self._feed.unit
        epochs = {f"epochs/{name}": round(n, 4) for name, n in self._feed.epochs(step).items()}
        if self._log:
            rates = {f"{unit}_per_second": round(rate, 1), "data_wait_share": round(wait, 5)}
            self._log.write({"step": step, **values, **rates, **epochs})
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} {unit}/s", refresh=False)
