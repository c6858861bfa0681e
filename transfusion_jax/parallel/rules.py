"""The one table from logical axes to mesh axes, and the placements derived from it."""

import math

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# `data` cuts the batch and replicates the model. `fsdp` cuts the batch and the parameters.
# `sequence` cuts the positions of a row (context parallelism) and the parameters. `tensor` cuts
# heads, feed-forward and vocabulary (Megatron) and, between layers, positions as well (Korthikanti
# et al. 2022, arXiv 2205.05198).
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "residual": ("sequence", "tensor"),
    "layers": None,
    "embed": ("fsdp", "sequence"),
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Logical axis -> the mesh axes that cut it. None: never cut. A missing axis raises."""


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis."""
    placed = None if axis is None else RULES[axis]
    return (placed,) if isinstance(placed, str) else placed or ()


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
      ValueError: an axis has no rule, or two axes of the array go to the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"no sharding rule for the logical axes {unknown} of {axes}")
    placed = [None if axis is None else RULES[axis] for axis in axes]
    used = [mesh_axis for axis in axes for mesh_axis in mesh_axes(axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"two of the logical axes {axes} share a mesh axis: {placed}")
    return PartitionSpec(*placed)


def parameter_shardings(parameters: nnx.State, mesh: Mesh) -> dict:
    """Placement of every parameter, nested as in `nnx.to_pure_dict(parameters)`.

    Raises:
      ValueError: a mesh axis does not divide the dimension that it cuts.
    """

    def placement(path: tuple, variable: nnx.Variable) -> NamedSharding:
        spec = partition_spec(variable.get_metadata("out_sharding"))
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(variable.shape)
        except ValueError:
            name = ".".join(map(str, path))
            raise ValueError(
                f"mesh {dict(mesh.shape)} does not divide {name}{variable.shape}, placed {spec}"
            ) from None
        return sharding

    flat = {path: placement(path, variable) for path, variable in nnx.to_flat_state(parameters)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cuts the first dimension, the rows of a batch, over data and fsdp."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation to its logical axes on the current mesh; the identity without one.

    An axis whose devices do not divide it is not cut, as the one position of a decoding step.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, divided(axes, x.shape))


def divided(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes on the current mesh, where they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = [math.prod(mesh.shape[name] for name in mesh_axes(axis)) for axis in axes]
    parts = zip(partition_spec(axes), shape, devices, strict=True)
    return PartitionSpec(*(cut if size % n == 0 else None for cut, size, n in parts))
