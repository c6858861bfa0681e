"""What ends training early: a signal, or gradients that stay non-finite."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils

from transfusion_jax.errors import WorkFailed


class TrainingFailed(WorkFailed):
    """Training cannot continue; the message says why."""


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop; the second interrupts.

    With several processes, JAX's own preemption service makes all of them stop at the same step.
    """

    def __enter__(self) -> "StopSignal":
        self._received: str | None = None
        self._previous = {}
        if jax.process_count() == 1:
            self._previous = {
                s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == "SIGINT":
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def requested(self, step: int) -> str | None:
        """The name of the signal to stop for, after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return "preemption"
        return self._received


def check_finite(step: int, skipped_in_a_row: int, limit: int) -> None:
    """Raises TrainingFailed after `limit` steps in a row without finite gradients."""
    if skipped_in_a_row >= limit:
        raise TrainingFailed(
            f"stopped at step {step}: {skipped_in_a_row} steps in a row had gradients that are "
            "not finite; a smaller optimizer.learning_rate or a longer optimizer.warmup_steps "
            "usually helps"
        )
