"""Which rows of a batch a process reads, on meshes that keep its rows together and on others."""

import importlib.util
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import pytest

from transfusion_jax.config import MeshConfig
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.planning.topology import find_topology


class Device(NamedTuple):
    id: int
    process_index: int


class Sharding(NamedTuple):
    """Equal shards of the rows on devices of several processes, in the order of the devices."""

    processes: list[int]
    """The process of each device."""
    shards: list[int]
    """The shard on each device."""

    @property
    def mesh(self):
        return SimpleNamespace(shape={"data": max(self.shards) + 1, "fsdp": 1})

    def devices_indices_map(self, shape: tuple[int]) -> dict:
        size = shape[0] // self.mesh.shape["data"]
        places = enumerate(zip(self.processes, self.shards, strict=True))
        return {
            Device(number, process): (slice(size * shard, size * (shard + 1)),)
            for number, (process, shard) in places
        }


def rows_of_all(sharding, rows: int, processes: int, monkeypatch) -> list[tuple[int, ...]]:
    """What each process reads."""
    result = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        result.append(process_rows(sharding, rows))
    return result


@pytest.mark.parametrize(
    "processes, shards, expected",
    [
        ([0, 0, 1, 1], [0, 1, 2, 3], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ([0, 1, 0, 1], [0, 1, 2, 3], [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ([0, 0, 1, 1], [1, 3, 0, 2], [(2, 3, 6, 7), (0, 1, 4, 5)]),
        ([0, 0, 1, 1], [0, 1, 0, 1], [(0, 1, 2, 3), (0, 1, 2, 3)]),
        ([0, 1, 2, 3], [0, 0, 1, 1], [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ([0, 0, 1, 1], [0, 1, 1, 2], [(0, 1, 2, 3), (2, 3, 4, 5)]),
        ([0, 0, 1], [0, 1, 2], [(0, 1, 2, 3), (4, 5)]),
    ],
    ids=["together", "apart", "turned round", "the same", "shared", "overlapping", "uneven"],
)
def test_a_process_reads_the_rows_that_its_devices_hold(processes, shards, expected, monkeypatch):
    sharding = Sharding(processes, shards)
    rows = 2 * (max(shards) + 1)
    assert rows_of_all(sharding, rows, len(expected), monkeypatch) == expected


def test_one_process_reads_the_whole_batch():
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert process_rows(sharding, 16) == tuple(range(16))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the topology of TPUs needs libtpu (pip install '.[tpu]')",
)
@pytest.mark.parametrize(
    "topology, mesh, processes, count",
    [
        ("v5p:4x4x4", MeshConfig(data=1, fsdp=64), 16, 16),
        ("v5p:4x4x4", MeshConfig(data=1, fsdp=8, tensor=8), 16, 8),
        ("v5e:4x4", MeshConfig(data=4, fsdp=4), 4, 4),
    ],
    ids=str,
)
def test_processes_of_a_pod_read_every_row(topology, mesh, processes, count, monkeypatch):
    devices = list(find_topology(topology).devices)
    sharding = batch_sharding(make_mesh(mesh, devices))
    read = rows_of_all(sharding, 64, processes, monkeypatch)
    held = sharding.devices_indices_map((64,))
    for device, (shard,) in held.items():
        assert set(range(*shard.indices(64))) <= set(read[device.process_index])
    assert len(set(read)) == count and all(len(rows) == 64 // count for rows in read)


SLICES = (
    *("v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x4"),
    *("v4:4x4x4", "v4:4x4x8", "v6e:4x4", "v6e:8x8", "v6e:16x16"),
)
"""All that an experiment names, and others."""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the topology of TPUs needs libtpu (pip install '.[tpu]')",
)
@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize(
    "axes", ["data", "fsdp", "data=2,fsdp", "fsdp,tensor=4", "fsdp,sequence=8"]
)
def test_a_process_of_a_slice_reads_what_its_devices_hold(topology, axes, monkeypatch):
    devices = list(find_topology(topology).devices)
    sizes = {"data": 1, "fsdp": 1}
    for axis in axes.split(","):
        name, _, size = axis.partition("=")
        sizes[name] = int(size or -1)
    sharding = batch_sharding(make_mesh(MeshConfig(**sizes), devices))
    rows = 2 * len(devices)
    held: dict[int, set[int]] = {}
    for device, (shard, *_) in sharding.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).update(range(*shard.indices(rows)))
    read = rows_of_all(sharding, rows, len(held), monkeypatch)
    assert [set(some) for some in read] == [held[process] for process in range(len(held))]
    assert all(len(some) == len(set(some)) for some in read)
    assert set().union(*held.values()) == set(range(rows))


PROCESS = """
import sys
import jax
import numpy as np
from transfusion_jax.config import MeshConfig
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.training.feed import Feed

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
a, b, c, d = jax.devices()
sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2), [a, c, b, d]))
feed = Feed(None, rows=8, prefetch=1, fingerprints=(), unit="rows", amount=8)
array = feed.on_devices(np.asarray(process_rows(sharding, 8)), sharding)
for shard in array.addressable_shards:
    print(shard.index[0].start or 0, *shard.data.tolist())
"""


def test_two_processes_that_alternate_put_every_row_where_the_mesh_wants_it():
    """Their devices hold shards 0 and 2, and 1 and 3."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    shards = [[tuple(map(int, line.split())) for line in text.splitlines()] for text in printed]
    assert sorted(shards[0]) == [(0, 0, 1), (4, 4, 5)]
    assert sorted(shards[1]) == [(2, 2, 3), (6, 6, 7)]
