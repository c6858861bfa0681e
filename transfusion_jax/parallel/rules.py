"""The one table from logical axes to mesh axes, and the placement of parameters that follows from it."""

import functools

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Mesh axes: `data` replicates the model; `fsdp` cuts parameters and batch; `sequence` cuts parameters and the positions
# of a row (context parallelism); `tensor` cuts heads, feed-forward and vocabulary (Megatron), and between layers the
# positions once more (Korthikanti et al. 2022, arXiv 2205.05198). A logical axis that is absent here is a mistake; None
# means never cut.
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


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis."""
    placed = None if axis is None else RULES[axis]
    return (placed,) if isinstance(placed, str) else placed or ()


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
      ValueError: an axis has no rule, or two axes of the array go to the same mesh axis.
    """
    unknown = [a for a in axes if a is not None and a not in RULES]
    if unknown:
        raise ValueError(f"no sharding rule for the logical axes {unknown} of {axes}")
    placed = [RULES[a] if a is not None else None for a in axes]
    used = [m for a in axes for m in mesh_axes(a)]
    if len(used) != len(set(used)):
        raise ValueError(f"two of the logical axes {axes} share a mesh axis: {placed}")
    return PartitionSpec(*placed)


def parameter_shardings(parameters: nnx.State, mesh: Mesh) -> dict:
    """Placement of every parameter, as a nested dict like `nnx.to_pure_dict(parameters)`.

    Raises:
      ValueError: a mesh axis does not divide the dimension that it cuts.
    """

    def place(path, variable):
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

    return nnx.to_pure_dict(
        nnx.from_flat_state({p: place(p, v) for p, v in nnx.to_flat_state(parameters)})
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes, everything else whole."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation to its logical axes under the current mesh; without a mesh it is the identity."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gathered(parameter: nnx.Variable, dtype: jax.typing.DTypeLike) -> Array:
    """A parameter in `dtype`, of which every device has all that `fsdp` and `sequence` cut, just before it is used.

    Gradients are summed into the parts (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054). It is said here
    because XLA for TPU would rather multiply by one part after another, and add up the products in main memory.
    """
    value = parameter[...].astype(dtype)
    axes = parameter.get_metadata("out_sharding")[
        -value.ndim :
    ]  # a layer of a stack has lost its first axis
    return _gathered(value, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x, axes):
    return constrain(x, *(None if "fsdp" in mesh_axes(axis) else axis for axis in axes))


def _scattered(axes, _, gradient):
    # Summed whole and then cut, in one collective: asked for the parts alone, XLA would make a loop over them, too.
    return (constrain(_gathered(gradient, axes), *axes),)


_gathered.defvjp(lambda x, axes: (_gathered(x, axes), None), _scattered)
