"""The device mesh, and which rows of a batch this process reads."""

import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from transfusion_jax.config import MeshConfig


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence, tensor over all devices.

    Several TPU slices are joined by a network that is slower than the links inside a slice; only
    `data` crosses it.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or the number of slices does
        not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    on_tpu = devices[0].platform == "tpu"
    # GPUs have a slice_index too, one per host.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    sizes = _axis_sizes(config, devices, slices)
    # A logical axis may cut a physical one of a TPU's torus, or few meshes would fit.
    options = {"devices": devices, "allow_split_physical_axes": on_tpu}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), **options)
    else:
        inside = {**sizes, "data": sizes["data"] // slices}
        between = {**dict.fromkeys(sizes, 1), "data": slices}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(inside.values()), tuple(between.values()), **options
        )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _axis_sizes(config: MeshConfig, devices: list[Any], slices: int) -> dict[str, int]:
    """Devices along each axis, with -1 resolved."""
    sizes = config.axes
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"{asked} do not fit the {len(devices)} devices present ({devices[0].platform})"
        )
    if sizes["data"] % slices:
        raise ValueError(f"{asked}: data={sizes['data']} is not divisible by the {slices} slices")
    return sizes


def whole_rows(mesh: Mesh) -> Mesh:
    """The same devices with `sequence` a part of `fsdp`: parameters are cut alike, rows whole."""
    shape = mesh.devices.shape
    grid = mesh.devices.reshape(shape[0], shape[1] * shape[2], 1, shape[3])
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)


def check_rows(mesh: Mesh, rows: int, name: str = "data.batch_rows", parts: int = 1) -> None:
    """Raises ValueError unless the batch axes of the mesh divide each of `parts` microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * parts):
        microbatches = f" times train.accumulation={parts}" if parts > 1 else ""
        raise ValueError(
            f"{name}={rows} is not divisible by the {shards} shards of mesh axes data * fsdp"
            f"{microbatches}"
        )


def process_rows(
    sharding: NamedSharding, rows: int, name: str = "data.batch_rows"
) -> tuple[int, ...]:
    """The rows of a global batch that the devices of this process hold, in ascending order.

    They are asked of the sharding, never computed: the mesh of a TPU pod follows its links, so the
    rows of one process are often apart (0, 4, 16 and 20 of 64 on v5p:4x4x4), and processes that
    share rows along `sequence` or `tensor` hold the same ones.

    Raises:
      ValueError: the batch axes of the mesh do not divide `rows`.
    """
    check_rows(sharding.mesh, rows, name)
    shards = sharding.devices_indices_map((rows,)).items()
    own = [shard for device, (shard, *_) in shards if device.process_index == jax.process_index()]
    return tuple(sorted({row for shard in own for row in range(*shard.indices(rows))}))
