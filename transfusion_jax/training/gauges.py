"""What is measured of the steps from outside: their time, FLOPs and memory."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from transfusion_jax.parallel.chips import GIB, peak_flops
from transfusion_jax.training.feed import Feed


class Gauges:
    """Counts the model FLOPs of batches and turns them into rates.

    A batch is counted on the host when its step is dispatched, and enters a rate when the step is
    known to have finished.
    """

    def __init__(self, feed: Feed, devices: Sequence[Any]):
        self._count = feed.flops
        self._peak = peak_flops(devices) if devices else None
        self._dispatched: dict[int, float] = {}
        self._flops = 0.0

    def dispatched(self, step: int, batch: Any) -> None:
        """Counts a batch, NumPy arrays of the rows that this process holds."""
        if self._count is not None:
            self._dispatched[step] = self._count(batch)

    def finished(self, step: int) -> None:
        self._flops += self._dispatched.pop(step, 0.0)

    def row(self, steps: int, elapsed: float) -> dict[str, float]:
        """To log of the last `steps` steps, which took `elapsed` seconds; counts anew from here.

        What is not known here is left out: utilisation without a published peak, memory where the
        backend does not tell it, FLOPs where they are not counted.
        """
        row = {"time": round(time.time(), 3), "step_seconds": round(elapsed / steps, 6)}
        if self._count is not None:
            row["model_flops_per_step"] = self._flops / steps
            row["model_flops_per_second"] = self._flops / elapsed
            if self._peak is not None:
                row["model_flop_utilisation"] = round(self._flops / elapsed / self._peak, 5)
        if (peak := peak_memory()) is not None:
            row["device_memory_gib"] = round(peak / GIB, 3)
        self._flops = 0.0
        return row


def peak_memory() -> int | None:
    """Most bytes that a device of this process has held; None if the backend does not say."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
