"""Goodput: the share of a run's time that went into steps it kept, over all its restarts.

Every second of a run's processes is charged to one thing:

startup      until the loop begins: imports, packing plans, restoring a checkpoint
compiling    the first step of each start, dispatched
steps        steps that are part of the run as it stands: what is left of a loop's time
data         waiting for a batch while no step was running
checkpoints  waiting for a checkpoint to be copied from the devices, and for the last to be written
validation   validation and samples between steps
evaluation   suites after the last step
repeated     steps that a kill undid, and whatever else a killed process did since its last note

The account is kept in `goodput.json`, written at the start, after compiling, with each checkpoint
and at the end. It notes how much time the steps up to each checkpoint took. A start that resumes at
step s charges what was spent on later steps to `repeated`, and so the time from the last note to
the last sign of life in `metrics.jsonl`. Time in which no process ran is `down_seconds`, which is
no part of the shares.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfusion_jax.files import write_json
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.metrics import read_metrics

FILE = "goodput.json"
CHARGES = (
    "startup",
    "compiling",
    "steps",
    "data",
    "checkpoints",
    "validation",
    "evaluation",
    "repeated",
)
KEPT_MARKS = 100
"""Checkpoints to which a run can fall back without losing count."""


def _silent(line: str) -> None:
    pass


class Account:
    """Where the seconds of a run went. One that is made without a file only counts this start."""

    def __init__(
        self,
        file: Path | None = None,
        report: Report = _silent,
        clock: Callable[[], float] = time.time,
    ):
        self.seconds = dict.fromkeys(CHARGES, 0.0)
        self.down = 0.0
        self.starts = 1
        self._marks = {0: 0.0}  # step of a checkpoint -> seconds of steps up to it
        self._file = file
        self._report = report
        self._clock = clock
        self._since = clock()
        self._now_on = "startup"

    def charge(self, to: str) -> None:
        """Charges the time since the last charge."""
        now = self._clock()
        self.seconds[to] += max(now - self._since, 0.0)
        self._since = now

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Charges the time inside to `what`, but for what is charged elsewhere in it."""
        self.charge(self._now_on)
        before = self._now_on
        self._now_on = what
        try:
            yield
        finally:
            self.charge(what)
            self._now_on = before

    def saved(self, step: int) -> None:
        """Notes that a checkpoint of this step was begun."""
        self.charge(self._now_on)
        self._marks[step] = self.seconds["steps"]
        self._marks = dict(sorted(self._marks.items())[-KEPT_MARKS:])
        self.write()

    def summary(self) -> dict[str, Any]:
        """`goodput`, and the share of each charge."""
        self.charge(self._now_on)
        total = sum(self.seconds.values())
        shares = {name: round(s / total, 5) if total else 0.0 for name, s in self.seconds.items()}
        return {"goodput": shares["steps"], "wall_shares": shares}

    def write(self) -> None:
        """Writes the account. A disk that is full or not to be written is reported, not raised."""
        if self._file is None:
            return
        summary = self.summary()
        value = {
            "goodput": summary["goodput"],
            "shares": summary["wall_shares"],
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
            "down_seconds": round(self.down, 3),
            "starts": self.starts,
            "step_seconds_at_checkpoints": {str(k): round(s, 3) for k, s in self._marks.items()},
            "time": self._since,
        }
        try:
            write_json(self._file, value)
        except OSError as error:
            self._report(f"could not write {self._file} ({error.strerror})")

    def _continue(self, stored: dict[str, Any], step: int, begun: float, alive: float) -> None:
        """Goes on from an earlier start's account; see `open_account`."""
        self.seconds |= {name: float(stored["seconds"][name]) for name in CHARGES}
        marks = {int(k): float(s) for k, s in stored["step_seconds_at_checkpoints"].items()}
        self._marks = {k: s for k, s in marks.items() if k <= step} or {0: 0.0}
        kept = min(self._marks[max(self._marks)], self.seconds["steps"])
        last = float(stored["time"])
        alive = min(max(alive, last), max(begun, last))
        self.seconds["repeated"] += self.seconds["steps"] - kept + alive - last
        self.seconds["steps"] = kept
        self.down = float(stored["down_seconds"]) + max(begun - alive, 0.0)
        self.starts = int(stored["starts"]) + 1
        self._since = max(begun, alive)


def open_account(
    directory: Path,
    step: int,
    report: Report,
    begun: float | None = None,
    clock: Callable[[], float] = time.time,
) -> Account:
    """The account of a run that begins or resumes at `step`, written once; call it before anything
    is logged.

    Args:
      begun: clock time at which this process began; what it did since is start-up. None: now.
    """
    file = directory / FILE
    account = Account(file, report, clock)
    now = clock()
    account._since = begun = now if begun is None else min(begun, now)
    if file.exists():
        try:
            rows = read_metrics(directory)
            alive = (rows[-1].get("time") if rows else None) or 0.0
            account._continue(json.loads(file.read_text()), step, begun, float(alive))
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            report(f"{file} cannot be read ({error}); goodput is counted from here on")
            account = Account(file, report, clock)
    account.write()
    return account
