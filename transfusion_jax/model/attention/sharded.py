"""Attention on a mesh: every device works on its own rows, positions and heads.

Where the positions of a row are cut (mesh axis `sequence`: context parallelism), keys and values
are gathered first, and their gradients summed and scattered back. Intervals count positions of the
whole row, so a device's queries find their keys as they are.
"""

import math
from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import PartitionSpec

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.parallel.rules import mesh_axes


def on_shards(
    attend: Callable[[Array, Array, Array, Intervals], Array],
    q_BLNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    intervals: Intervals,
) -> Array:
    """`attend(q, k, v, intervals)` by all devices of the current mesh; without a mesh, `attend`
    itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q_BLNH, k_BSKH, v_BSKH, intervals)

    def placed(axis: str, *sizes: int):
        """Mesh axes of a logical axis; None if they do not cut or divide it (as the few rows of a
        generation)."""
        devices = math.prod(mesh.shape[name] for name in mesh_axes(axis))
        return None if devices == 1 or any(size % devices for size in sizes) else mesh_axes(axis)

    (B, L, N, _), (_, S, K, _) = q_BLNH.shape, k_BSKH.shape
    rows, heads = placed("batch", B), placed("heads", N, K)
    queries, keys = placed("sequence", L), placed("sequence", S)
    q_spec, k_spec = PartitionSpec(rows, queries, heads), PartitionSpec(rows, keys, heads)

    def local(q, k, v, intervals):
        if keys is not None:
            k, v = (jax.lax.all_gather(x, keys, axis=1, tiled=True) for x in (k, v))
        return attend(q, k, v, intervals)

    specs = q_spec, k_spec, k_spec, PartitionSpec(rows, queries)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(
        q_BLNH, k_BSKH, v_BSKH, intervals
    )
