"""The device mesh, and which rows of a batch this process feeds."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from transfusion_jax.config import MeshConfig


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence, tensor over all devices.

    Where the devices are several slices of TPUs, joined by a network that is slower than the links inside them, `data`
    alone crosses from one to the next.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, asked = config.axes, ", ".join(f"mesh.{axis}={n}" for axis, n in config.axes.items())
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and len(devices) % fixed == 0:
        sizes = {axis: len(devices) // fixed if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"{asked} do not fit the {len(devices)} devices at hand ({devices[0].platform})"
        )
    on_tpu = devices[0].platform == "tpu"  # GPUs have a slice_index as well, one for each host
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if sizes["data"] % slices:
        raise ValueError(f"{asked}: data={sizes['data']} is not divisible by the {slices} slices")
    inside = {**sizes, "data": sizes["data"] // slices}
    shape, split = tuple(inside.values()), {"allow_split_physical_axes": on_tpu}
    if slices > 1:
        between = (slices,) + (1,) * (len(shape) - 1)
        grid = mesh_utils.create_hybrid_device_mesh(shape, between, devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_rows(mesh: Mesh, rows: int, name: str = "data.batch_rows", parts: int = 1) -> None:
    """Raises ValueError unless `rows`, in `parts` equal parts, can be cut over the batch axes of the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * parts):
        turns = f" times train.accumulation={parts}" if parts > 1 else ""
        raise ValueError(
            f"{name}={rows} is not divisible by the {shards} shards of mesh axes data * fsdp{turns}"
        )


def host_block(
    sharding: NamedSharding, rows: int, name: str = "data.batch_rows"
) -> tuple[int, int]:
    """(block, blocks): the global batch of `rows` is cut into equal blocks, and this process feeds one.

    Raises:
      ValueError: the batch axes of the mesh do not divide `rows`.
    """
    check_rows(sharding.mesh, rows, name)
    slices = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values()]
    start = min(s.start or 0 for s in slices)
    stop = max(rows if s.stop is None else s.stop for s in slices)
    return start // (stop - start), rows // (stop - start)
