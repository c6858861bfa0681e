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

from transfusion_jax.parallel.rules import batch_sharding, mesh_axes, replicated


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

    def current(self) -> contextlib.AbstractContextManager:
        """Around computations."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def keys(self, seed: int, count: int) -> Array:
        """Random keys of so many rows, copied to every device."""
        with self.current():
            placed = None if self.mesh is None else replicated(self.mesh)
            return jax.jit(_keys, static_argnums=1, out_shardings=placed)(np.uint32(seed), count)

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


def _keys(seed: Array, count: int) -> Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
