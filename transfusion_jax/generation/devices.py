"""Where a model generates: cut over a mesh of devices, as it was trained, or on the default one."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.parallel.processes import gathered
from transfusion_jax.parallel.rules import batch_sharding, mesh_axes, replicated

CACHE_BYTES = 2 << 30
"""What caches of rows may take of a device that does not say how much memory it has."""
CACHE_SHARE = 4
"""Of a device that does, they may take one part in so many: phases hold copies of them."""


@dataclass(frozen=True)
class Devices:
    """Places what the host holds, the same in all processes, and reads what the devices hold."""

    mesh: Mesh | None = None
    """None: the default device."""

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes("batch"))

    def group(self, count: int, row_bytes: int) -> int:
        """How many of `count` rows, whose caches take so many bytes each, are answered at a time:
        all, or as many as the devices have room for, the same number on every device."""
        room = max(self.cache_bytes() // row_bytes, 1)
        if count <= min(room, self.shards):
            return count  # a device may hold all of them
        groups = -(-count // (room * self.shards))
        return -(-count // (groups * self.shards)) * self.shards

    def cache_bytes(self) -> int:
        """What caches of rows may take of a device; the least that any process finds."""
        limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
        return min(gathered(min(x // CACHE_SHARE if x else CACHE_BYTES for x in limits)))

    def current(self) -> contextlib.AbstractContextManager:
        """Around computations."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def keys(self, seed: int, first: int, count: int) -> Array:
        """Random keys of so many rows from row `first` on, copied to every device."""
        with self.current():
            placed = None if self.mesh is None else replicated(self.mesh)
            keys = jax.jit(_keys, static_argnums=2, out_shardings=placed)
            return keys(np.uint32(seed), np.int32(first), count)

    def put(self, batch: Any) -> Any:
        """Arrays of rows [B, ...]: cut if the shards divide B, else a copy for every device."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        cut, copied = batch_sharding(self.mesh), replicated(self.mesh)

        def place(x: Any) -> Array:
            x = np.asarray(x)
            sharding = cut if x.ndim and len(x) % self.shards == 0 else copied
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(place, batch)

    def host(self, tree: Any) -> Any:
        """Arrays of the devices as NumPy arrays, whole, in every process."""
        if self.mesh is not None and jax.process_count() > 1:
            with self.current():
                tree = jax.jit(lambda x: x, out_shardings=replicated(self.mesh))(tree)
        return jax.device_get(tree)


def _keys(seed: Array, first: Array, count: int) -> Array:
    row_B = first + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_B)
