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
from transfusion_jax.parallel.mesh import host_block, make_mesh
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


def blocks(sharding, rows: int, processes: int, monkeypatch) -> list[tuple[int, int]]:
    """What each process reads."""
    result = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        result.append(host_block(sharding, rows))
    return result


@pytest.mark.parametrize(
    "processes, shards, expected",
    [
        ([0, 0, 1, 1], [0, 1, 2, 3], [(0, 2), (1, 2)]),
        ([0, 1, 0, 1], [0, 1, 2, 3], [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], [1, 3, 0, 2], [(1, 2), (0, 2)]),
        ([0, 0, 1, 1], [0, 1, 0, 1], [(0, 1), (0, 1)]),
        ([0, 1, 2, 3], [0, 0, 1, 1], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 0, 1, 1, 2, 2], [0, 3, 1, 4, 2, 5], [(0, 3), (1, 3), (2, 3)]),
    ],
    ids=["together", "apart", "turned round", "the same rows", "shared rows", "three apart"],
)
def test_processes_read_every_row_between_them(processes, shards, expected, monkeypatch):
    sharding = Sharding(processes, shards)
    rows = 2 * (max(shards) + 1)
    assert blocks(sharding, rows, len(expected), monkeypatch) == expected


@pytest.mark.parametrize(
    "processes, shards",
    [([0, 0, 1, 1], [0, 1, 1, 2]), ([0, 0, 1, 1, 2], [0, 1, 2, 3, 4])],
    ids=["overlapping", "uneven"],
)
def test_rows_that_are_no_equal_blocks_are_refused(processes, shards):
    with pytest.raises(ValueError, match="rows of a batch that overlap or are unequal in number"):
        host_block(Sharding(processes, shards), max(shards) + 1)


def test_one_process_reads_the_whole_batch():
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert host_block(sharding, 16) == (0, 1)


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
    read = blocks(sharding, 64, processes, monkeypatch)
    assert sorted(set(read)) == [(block, count) for block in range(count)]
    assert all(read.count(block) == processes // count for block in read)


PROCESS = """
import sys
import jax
import numpy as np
from transfusion_jax.config import MeshConfig
from transfusion_jax.parallel.mesh import host_block, make_mesh
from transfusion_jax.parallel.rules import batch_sharding

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
a, b, c, d = jax.devices()
sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2), [a, c, b, d]))
block, blocks = host_block(sharding, 8)
rows = np.arange(8).reshape(blocks, -1)[block]
array = jax.make_array_from_process_local_data(sharding, rows, (8,))
for shard in array.addressable_shards:
    print(shard.index[0].start or 0, *shard.data.tolist())
"""


def test_two_processes_that_alternate_put_every_row_on_one_device():
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
    lines = [[tuple(map(int, line.split())) for line in text.splitlines()] for text in printed]
    assert [sorted(shard for shard, *_ in rows) for rows in lines] == [[0, 4], [2, 6]]
    assert sorted(row for rows in lines for _, *pair in rows for row in pair) == list(range(8))
