"""What a run shows and logs of its steps."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from transfusion_jax.training.metrics import MetricsLog
from transfusion_jax.training.update import Metrics
from transfusion_jax.training.watchdog import check_finite


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
                **{
                    f"epochs/{source}": round(read, 4)
                    for source, read in self._epochs(step).items()
                },
            }
            if self._log:
                self._log.write(row)
            self._bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {rate:,.0f} {self._unit}/s", refresh=False
            )
        self._bar.update(step - self._bar.n)
        check_finite(step, int(metrics["skipped_in_a_row"]), self._settings.max_skipped_steps)
