"""Attention under a mesh: every device works on its own rows and heads, and they exchange nothing."""

import math

import jax

from transfusion_jax.parallel.rules import RULES, partition_spec


def on_shards(function, arguments, results, arrays):
    """Runs `function` on every device's own part, as the logical axes of arguments and results say."""
    mesh, rows = jax.sharding.get_abstract_mesh(), arrays[0].shape[0]
    if mesh.empty:
        return function(*arrays)
    # A few rows that the mesh does not divide, as in generation, are worked on by every device.
    whole = rows % math.prod(mesh.shape[axis] for axis in RULES["batch"]) != 0

    def specs(arrays_axes):
        return tuple(partition_spec((None, *axes[1:]) if whole else axes) for axes in arrays_axes)

    return jax.shard_map(function, in_specs=specs(arguments), out_specs=specs(results), check_vma=False)(*arrays)
