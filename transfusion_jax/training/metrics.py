"""Metrics of a run: `metrics.jsonl`, one object per logged step, and the same for TensorBoard;
events in `events.jsonl`."""

import json
import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from transfusion_jax.training.observation import Observation
from transfusion_jax.training.weights_and_biases import Mirror

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class MetricsLog:
    """Appends to the metrics of a run directory; removes what a killed run logged after `step`."""

    def __init__(self, run_dir: Path, step: int, mirror: Mirror | None = None):
        self.path = run_dir / METRICS
        self._events = run_dir / EVENTS
        _cut_back(self.path, step)
        if self._events.exists():
            _cut_back(self._events, step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self._mirror = mirror

    def write(self, row: dict[str, float]) -> None:
        """Writes numbers with all digits of their float32 values, and null for non-finite ones."""
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self._board.add_scalar(name, value, row["step"])
        if self._mirror:
            self._mirror.write(row)

    def note(self, event: dict[str, Any]) -> None:
        """Appends an event, which has a `step`."""
        with self._events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def show(self, step: int, seen: Observation) -> None:
        """Shows pictures and texts."""
        for name, picture in seen.pictures.items():
            self._board.add_image(name, picture, step, dataformats="HWC")
        for name, text in seen.texts.items():
            self._board.add_text(name, text, step)
        if self._mirror and seen.pictures:
            self._mirror.show(step, dict(seen.pictures))

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._mirror:
            self._mirror.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged rows of a run; a last line that a kill cut short is left out."""
    return _read(run_dir / METRICS)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """What was noted of a run's loss, as `read_metrics`."""
    return _read(run_dir / EVENTS)


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _cut_back(path: Path, step: int) -> None:
    """Keeps the lines up to a step, atomically."""
    kept = [row for row in _read(path) if row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)
