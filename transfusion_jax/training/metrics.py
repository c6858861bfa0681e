"""Metrics of a run: `metrics.jsonl`, one object per logged step, and the same for TensorBoard;
events in `events.jsonl`."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.lines import Lines
from transfusion_jax.training.observation import Observation
from transfusion_jax.training.weights_and_biases import Mirror

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class MetricsLog:
    """Appends to the metrics of a run directory; removes what a killed run logged after `step`.

    What cannot be written is lost; that is reported, once for as long as it lasts.
    """

    def __init__(self, run_dir: Path, step: int, report: Report = print):
        self.path = run_dir / METRICS
        for path in (self.path, run_dir / EVENTS):
            if path.exists():
                _cut_back(path, step)
        self._rows = Lines(self.path)
        self._events = Lines(run_dir / EVENTS)
        from transfusion_jax.training.board import Board  # tensorboardX imports torch, if there

        self._board = Board(run_dir / "tensorboard", step)
        self._mirror: Mirror | None = None
        self._report = report
        self._failing = self._unsent = False

    def copy_to(self, mirror: Mirror | None) -> None:
        """Sends what is logged from now on there as well, if anywhere."""
        self._mirror = mirror

    def write(self, row: dict[str, float]) -> None:
        """Writes numbers with all digits of their float32 values, and null for non-finite ones."""
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        step = row["step"]
        shown = {
            name: value
            for name, value in row.items()
            if name not in ("step", "time") and value is not None
        }
        with self._reporting(f"the metrics of step {step}"):
            self._rows.append(row)
            self._board.scalars(step, shown)
        self._send(f"the metrics of step {step}", lambda mirror: mirror.write(row))

    def note(self, event: dict[str, Any]) -> None:
        """Appends an event, which has a `step`."""
        with self._reporting(f"what happened at step {event['step']}"):
            self._events.append(event)

    def show(self, step: int, seen: Observation) -> None:
        """Shows pictures and texts."""
        with self._reporting(f"the samples of step {step}"):
            for name, picture in seen.pictures.items():
                self._board.picture(step, name, picture)
            for name, text in seen.texts.items():
                self._board.text(step, name, text)
        if seen.pictures:
            pictures = dict(seen.pictures)
            self._send(f"the samples of step {step}", lambda mirror: mirror.show(step, pictures))

    def close(self) -> None:
        self._rows.close()
        self._events.close()
        with self._reporting("the last events"):
            self._board.close()
        self._send("the last of the metrics", lambda mirror: mirror.close())

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._report(f"could not write {what} to {self.path.parent} ({error.strerror})")
            self._failing = True

    def _send(self, what: str, send: Callable[[Mirror], None]) -> None:
        if self._mirror is None:
            return
        try:
            send(self._mirror)
            self._unsent = False
        except Exception as error:  # of every kind; training goes on without
            if not self._unsent:
                self._report(f"could not send {what} to Weights & Biases ({error})")
            self._unsent = True


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged rows of a run; a last line that a kill cut short is left out."""
    return _read(run_dir / METRICS)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """What was noted of a run's loss, as `read_metrics`."""
    return _read(run_dir / EVENTS)


def _read(path: Path) -> list[dict[str, Any]]:
    return [row for row, _ in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows and where their lines end, in bytes, up to a line that is none or has no end."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        end += len(line)
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        if isinstance(row, dict) and "step" in row:
            yield row, end


def _cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to a step. The file is cut, not written anew: the disk may be full."""
    end = 0
    for row, after in _rows(path):
        if row["step"] > step:
            break
        end = after
    os.truncate(path, end)
