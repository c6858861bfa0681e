"""The data of a run: its batches, by step, on the devices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
from jax.sharding import NamedSharding

from transfusion_jax.data.pipeline import read
from transfusion_jax.parallel.mesh import host_block


def _no_epochs(step: int) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Feed:
    """Where the batches of a run come from, and how they are counted."""

    batches: Callable[[int, int], grain.MapDataset]
    """Of (block, blocks): item s is this one of the equal parts of global batch s."""
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

    def read(self, start: int, sharding: NamedSharding) -> Iterator[Any]:
        """This process's part of the batches from step `start` on, read ahead by threads."""
        return read(self.batches(*host_block(sharding, self.rows)), start, self.prefetch)

    def on_devices(self, batch: Any, sharding: NamedSharding) -> Any:
        """This process's part of a batch, as part of the global arrays."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                sharding, x, (self.rows, *x.shape[1:])
            ),
            batch,
        )
