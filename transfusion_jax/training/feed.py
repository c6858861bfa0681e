"""The data of a run: its batches, by step, on the devices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from transfusion_jax.data.pipeline import read
from transfusion_jax.parallel.mesh import process_rows


def _no_epochs(step: int) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Feed:
    """Where the batches of a run come from, and how they are counted."""

    batches: Callable[[Sequence[int]], grain.MapDataset]
    """Of some rows: item s holds these rows of global batch s."""
    rows: int
    """Of a global batch."""
    prefetch: int
    """Batches read ahead of the step."""
    fingerprints: tuple[tuple[str, str], ...]
    """Name and digest of each source; another digest means that the data has changed."""
    unit: str
    """What throughput counts, in the plural."""
    amount: int
    """Of the unit, in a global batch."""
    epochs: Callable[[int], dict[str, float]] = _no_epochs
    """How often each source has been read by a step."""
    flops: Callable[[Any], float] | None = None
    """Model FLOPs of a step on a batch, by the rows that this process holds of it; None: they are
    not counted."""

    def read(self, start: int, sharding: NamedSharding) -> Iterator[Any]:
        """The rows that this process holds, batch by batch from step `start` on, read ahead."""
        rows = process_rows(sharding, self.rows)
        return read(self.batches(rows), start, self.prefetch)

    def on_devices(self, batch: Any, sharding: NamedSharding) -> Any:
        """The rows that this process holds, as its part of the global arrays."""
        rows = process_rows(sharding, self.rows)

        def place(x: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...]) -> np.ndarray:
                begin, end, _ = index[0].indices(self.rows)
                at = rows.index(begin)  # a shard's rows are neighbours, in the batch and here
                return x[at : at + end - begin]

            return jax.make_array_from_callback((self.rows, *x.shape[1:]), sharding, shard)

        return jax.tree.map(place, batch)
