"""Metrics of a run: `metrics.jsonl`, one object per logged step, and the same for TensorBoard."""

import json
import math
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends to the metrics of a run directory; removes what a killed run logged after `step`."""

    def __init__(self, run_dir: Path, step: int):
        self.path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, float]) -> None:
        """Writes numbers with all digits of their float32 values, and null for non-finite ones."""
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The logged rows of a run; a last line that a kill cut short is left out."""
    path = run_dir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
