"""What ends a run early: a signal, nothing moving, or gradients that stay non-finite."""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import jax

from transfusion_jax.errors import AGAIN, Stopped, WorkFailed
from transfusion_jax.parallel.stopping import Stopping, stopping


class TrainingFailed(WorkFailed):
    """Training cannot continue; the message says why."""


class Watch:
    """Turns signals into a request to save and stop: SIGTERM and the first Ctrl-C, unless others
    are named; the second Ctrl-C interrupts. Ends the process if nothing moves.

    With several processes, a signal to one of them makes all stop at the same point.
    """

    def __init__(self, *signals: signal.Signals):
        self._signals = signals or (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> "Watch":
        self._received: str | None = None
        self._stopping: Stopping | None = None
        self._passed_on = False
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._previous = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._stopping:
            self._stopping.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == "SIGINT":
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def moved(self) -> str | None:
        """Something was done; the signal to stop for, if one came.

        All processes must call it equally often: they stop at the same call.
        """
        self._moved = time.monotonic()
        if jax.process_count() == 1:
            return self._received
        self._stopping = self._stopping or stopping()
        if self._received and not self._passed_on:
            self._passed_on = True
            self._stopping.ask(f"{self._received} to process {jax.process_index()}")
        return self._stopping.passed()

    def check(self) -> None:
        """As `moved`; raises Stopped if a signal came."""
        if stopped_by := self.moved():
            raise Stopped(stopped_by)

    def against_stalls(self, timeout: float, directory: Path) -> None:
        """From now on, if nothing moves for `timeout` seconds, this process writes the stacks of
        its threads to a file in the directory and ends with `AGAIN`; 0: never."""
        if timeout:
            self._moved = time.monotonic()
            arguments = (timeout, directory / f"stacks-{jax.process_index()}.txt")
            threading.Thread(target=self._end_stall, args=arguments, daemon=True).start()

    def _end_stall(self, timeout: float, stacks: Path) -> None:
        while not self._over.wait(min(timeout / 20, 5.0)):
            still = time.monotonic() - self._moved
            if still > timeout:
                _write_stacks(stacks)
                print(
                    f"error: process {jax.process_index()}: nothing has moved for {still:.0f} s, "
                    f"more than processes.stall_timeout={timeout:g}; the stacks of all threads are "
                    f"in {stacks}; the same command resumes the run",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(AGAIN)  # an ordinary exit would wait for the other processes


def _write_stacks(file: Path) -> None:
    faulthandler.dump_traceback(all_threads=True)
    try:
        with file.open("w") as opened:
            faulthandler.dump_traceback(opened, all_threads=True)
    except OSError as error:  # perhaps the file system is what hangs
        print(f"cannot write {file}: {error.strerror}", file=sys.stderr, flush=True)


def check_finite(step: int, skipped_in_a_row: int, limit: int) -> None:
    """Raises TrainingFailed after `limit` steps in a row without finite gradients."""
    if skipped_in_a_row >= limit:
        raise TrainingFailed(
            f"stopped at step {step}: {skipped_in_a_row} steps in a row had gradients that are "
            "not finite. In a new run a smaller optimizer.learning_rate or a longer "
            "optimizer.warmup_steps usually helps; this one stops here again, unless "
            "train.max_skipped_steps is larger"
        )
