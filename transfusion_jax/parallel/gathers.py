"""Parameters gathered just before use, and their gradients summed into shards; in steps, where they
are cut over many devices (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from transfusion_jax.parallel.rules import RULES, constrain, mesh_axes, partition_spec

TOGETHER = 16
"""Devices whose shards are gathered in one step."""


def gathered(parameter: nnx.Variable, dtype: jax.typing.DTypeLike) -> Array:
    """All-gathers a parameter over fsdp and sequence just before use, in `dtype`.

    Its gradient is reduced into shards. Explicit because XLA for TPU would rather multiply by one
    shard after another and accumulate the products in main memory.
    """
    return _gathered(*value_and_axes(parameter, dtype))


def value_and_axes(
    parameter: nnx.Variable, dtype: jax.typing.DTypeLike
) -> tuple[Array, tuple[str | None, ...]]:
    """The value of a parameter, in `dtype`, and its logical axes."""
    value = parameter[...].astype(dtype)
    # Inside the scan over layers, a stacked parameter has lost its first axis.
    return value, parameter.get_metadata("out_sharding")[-value.ndim :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Array, axes: tuple[str | None, ...]) -> Array:
    return whole(x, axes)


def whole(x: Array, axes: tuple[str | None, ...]) -> Array:
    """All shards of a parameter."""
    return constrain(_joined(x, axes), *_whole(axes))


def _whole(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes that still cut a parameter that is gathered."""
    return tuple(None if "fsdp" in mesh_axes(axis) else axis for axis in axes)


def _joined(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Gathers the shards of more than `TOGETHER` devices in steps; leaves those of fewer to XLA.

    XLA for TPU v5p, unless told that the slice is a torus, writes the all-gather of 64 devices as
    an all-reduce of arrays that are zero but for a shard, which sends twice as much, whatever the
    shapes of the shards.
    """
    mesh = jax.sharding.get_abstract_mesh()
    cut = [place for place, axis in enumerate(axes) if "fsdp" in mesh_axes(axis)]
    if mesh.empty or not cut:
        return x
    (place,) = cut
    names = mesh_axes(axes[place])
    if math.prod(mesh.shape[name] for name in names) <= TOGETHER:
        return x

    def local(x):
        for name in reversed(names):  # the last one is cut the finest
            x = _joined_along(x, name, place)
        return x

    specs = partition_spec(axes), partition_spec(_whole(axes))
    return jax.shard_map(local, in_specs=specs[:1], out_specs=specs[1], check_vma=False)(x)


def _joined_along(x: Array, name: str, place: int) -> Array:
    """On a device: the shards of all devices along a mesh axis, in steps."""
    for groups in gather_steps(jax.sharding.get_abstract_mesh().shape[name]):
        x = jax.lax.all_gather(x, name, axis=place, tiled=True, axis_index_groups=groups)
    return x


def scattered(
    product: Callable[[Array, Array], Array],
    x: Array,
    gradient: Array,
    axes: tuple[str | None, ...],
) -> Array:
    """The shards of a parameter's gradient: its products on each device, summed in steps.

    XLA for TPU v5p writes the reduce-scatter of 64 devices as an all-reduce, which sends twice as
    much; of 16, it does not.

    Args:
      product: gives a device's part from its rows of the other two.
      axes: of the parameter, which `scatters_in_steps`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    place = _cut_by_fsdp(axes)

    def local(x, gradient):
        total = product(x, gradient)
        for groups in reversed(gather_steps(mesh.shape["fsdp"])):
            total = jax.lax.psum_scatter(
                total, "fsdp", scatter_dimension=place, tiled=True, axis_index_groups=groups
            )
        return jax.lax.psum(total, "data")

    rows = PartitionSpec(RULES["batch"])
    return jax.shard_map(local, in_specs=(rows, rows), out_specs=_shards(axes), check_vma=False)(
        x, gradient
    )


def on_rows(
    function: Callable[..., Any],
    parameter: nnx.Variable,
    dtype: jax.typing.DTypeLike,
    *arrays: Array,
) -> Any:
    """`function(whole parameter, *arrays)`, each row of the results from its row of the arrays.

    Where rows alone are cut, each device runs it on its own rows, and adds up the parameter's
    gradient over them, in `dtype` and through all loops of the function, before it is summed over
    devices.
    """
    value, axes = value_and_axes(parameter, dtype)
    if not _cuts_rows_alone(arrays[0].shape[0]):
        return function(_gathered(value, axes), *arrays)
    place = _cut_by_fsdp(axes)

    def local(shard, *arrays):
        return function(_joined_along(shard, "fsdp", place), *arrays)

    rows = PartitionSpec(RULES["batch"])
    return jax.shard_map(
        local,
        in_specs=(_shards(axes), *(rows for _ in arrays)),
        out_specs=rows,
        check_vma=False,
    )(value, *arrays)


def holds_whole_rows() -> bool:
    """Whether arrays are a device's own rows, uncut: without a mesh, on one device, or in
    `on_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual


def _cuts_rows_alone(rows: int) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return (
        not mesh.empty
        and mesh.size > 1
        and mesh.shape["sequence"] == mesh.shape["tensor"] == 1
        and rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    )


def _cut_by_fsdp(axes: tuple[str | None, ...]) -> int:
    """The dimension that fsdp cuts."""
    (place,) = (i for i, axis in enumerate(axes) if "fsdp" in mesh_axes(axis))
    return place


def _shards(axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*("fsdp" if "fsdp" in mesh_axes(axis) else None for axis in axes))


def scatters_in_steps(axes: tuple[str | None, ...], rows: int) -> bool:
    """Whether a parameter's gradient is summed in steps: over as many devices as its shards are
    gathered from in steps, where rows alone are cut.

    With `tensor` it is left to XLA: inside a `shard_map` over some axes of a mesh, XLA for CPUs
    aborts at sums in bfloat16 (jaxlib 0.10.2).
    """
    return (
        _cuts_rows_alone(rows)
        and any("fsdp" in mesh_axes(axis) for axis in axes)
        and jax.sharding.get_abstract_mesh().shape["fsdp"] > TOGETHER
    )


def gather_steps(devices: int) -> list[list[list[int]]]:
    """Groups of at most `TOGETHER` devices, for each step of a gather of shards in their order.

    The first step joins neighbours, the next one what these have joined. The last step moves most,
    so its groups are the largest: they have the most links. A prime number of devices above
    `TOGETHER` is one step.
    """
    sizes, left = [], devices
    while left > 1:
        sizes.append(max((n for n in range(2, TOGETHER + 1) if left % n == 0), default=left))
        left //= sizes[-1]
    steps, joined = [], 1
    for size in reversed(sizes):
        block = size * joined
        steps.append(
            [
                list(range(start, start + block, joined))
                for begin in range(0, devices, block)
                for start in range(begin, begin + joined)
            ]
        )
        joined = block
    return steps


def _gathered_forward(x, axes):
    return _gathered(x, axes), None


def _gathered_backward(axes, _, gradient):
    # Both constraints make one reduce-scatter. With the second alone, XLA loops over shards again.
    return (constrain(constrain(gradient, *_whole(axes)), *axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
