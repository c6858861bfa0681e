"""Runs points one after another, each in a process of its own that has the devices to itself."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from types import FrameType

from transfusion_jax.errors import AGAIN, ComeAgain
from transfusion_jax.sweeps.points import Point, varying, written

RESTARTS = 5
"""How often a point is started again that asks for it, or was killed."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What stops a sweep: a job's end, Ctrl-C, a terminal that was closed (unless it is ignored, as
under nohup)."""

Command = Callable[[Point], list[str]]
"""What runs a point, or resumes it."""


class Child:
    """The process that runs now. Signals to this one are passed on to it."""

    def __enter__(self) -> "Child":
        self.stopped_by: str | None = None
        self._process: subprocess.Popen | None = None
        outlives_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [n for n in SIGNALS if n != signal.SIGHUP or not outlives_terminal]
        self._previous = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def run(self, command: Sequence[str]) -> int:
        """Runs a command to its end; its exit code, 128 + signal where it was killed."""
        # In a session of its own, or the terminal's Ctrl-C would reach it twice.
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.stopped_by:  # while it was started
            self._process.terminate()
        code = self._process.wait()
        return code if code >= 0 else 128 - code


def run_points(
    points: Sequence[Point],
    command: Command,
    report: Callable[[str], None],
    restarts: int = RESTARTS,
) -> dict[str, int]:
    """Runs the points that are not finished; returns the exit codes of those that failed, by name.

    Raises:
      ComeAgain: SIGTERM or Ctrl-C ended the sweep, and the point that was running.
    """
    failed: dict[str, int] = {}
    seconds: list[float] = []
    begin = time.monotonic()
    with Child() as child:
        for number, point in enumerate(points, 1):
            place = f"point {number} of {len(points)}, {point.name}"
            if point.summary() is not None:
                ran, _ = varying([point.as_run(), point.experiment])
                report(f"{place}: finished already" + (f", with {written(ran)}" if ran else ""))
                continue
            started = time.monotonic()
            left = sum(other.status() != "finished" for other in points[number - 1 :])
            report(f"{place}: {progress(started - begin, seconds, left)}")
            code = _run(point, command, child, restarts, report)
            if code == 0 and (trouble := point.ran_otherwise()):  # the file has changed since
                report(f"{place}: {trouble}")
                code = 1
            if code:
                failed[point.name] = code
                report(f"{place}: failed with exit code {code}")
            seconds.append(time.monotonic() - started)
    return failed


def progress(elapsed: float, seconds: Sequence[float], left: int) -> str:
    """Time so far, and what `left` points will take if they take as long as others did on
    average."""
    from tqdm import tqdm

    so_far = f"{tqdm.format_interval(elapsed)} so far"
    if not seconds:
        return so_far
    return f"{so_far}, about {tqdm.format_interval(sum(seconds) / len(seconds) * left)} left"


def _run(
    point: Point, command: Command, child: Child, restarts: int, report: Callable[[str], None]
) -> int:
    """Runs a point to its end, started again where that helps; its last exit code."""
    for left in range(restarts, -1, -1):
        code = child.run(command(point))
        _check_stop(child)
        if left == 0 or not asks_again(code):
            return code
        report(f"{point.name}: exit code {code}, started again ({left - 1} restarts left)")
    return code


def asks_again(code: int) -> bool:
    """Whether a run that ended with this code goes on when it is started again."""
    return code == AGAIN or code > 128


def _check_stop(child: Child) -> None:
    if child.stopped_by:
        raise ComeAgain(f"stopped by {child.stopped_by}; the same command does the rest")
