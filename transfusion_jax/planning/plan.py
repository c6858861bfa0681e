"""Plans: the training step compiled for TPUs you do not have, and what it takes there.

The step is the one that training runs (`pretraining/step.py`), on the shapes of its state and
batch. It fits if the compiler's figure for its memory does. Its time is a roofline: the longest of
computing, of memory traffic and of traffic between chips, each at the published rate, as if all
three overlapped. That is a lower bound, not a forecast.
"""

import dataclasses
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.packing import pack
from transfusion_jax.model.attention.chunked import rows_together
from transfusion_jax.model.attention.platforms import DEFAULT_BLOCK
from transfusion_jax.model.work import Work, model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import RULES, batch_sharding, mesh_axes
from transfusion_jax.planning.program import Program, read_program
from transfusion_jax.planning.rows import Rows, RowWork, row_work
from transfusion_jax.planning.topology import HOST, Topology
from transfusion_jax.pretraining.state import Blueprint, blueprint
from transfusion_jax.pretraining.step import compiled_step

# FLOPs of a kernel for each pair of a query and a key and each value of a head: two for each
# product with them.
KERNEL_FLOPS = {
    "interval_attention": 4,
    "interval_attention_dq": 6,
    "interval_attention_dkv": 8,
    "interval_attention_dqkv": 10,
}
QUICKLY = {"optimization_level": 9}
"""XLA's O0, "fastest compilation" (openxla.org/xla/effort_levels), for steps with convolutions. At
full effort each of them takes the compiler some ten seconds, and a U-Net has some eighty. Memory
may differ from that at full effort, as docs/scaling.md says. JAX_OPTIMIZATION_LEVEL asks for
another level."""
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    arguments: int
    """The state and a batch."""
    temporaries: int
    peak: int
    """Arguments, temporaries, results that do not replace an argument, and the program itself."""
    memory: int
    """What the compiler may use."""
    host: int = 0
    """In the memory of the host, for each chip (remat offload)."""


@dataclass(frozen=True)
class Costs:
    """What one step takes, where it fits."""

    hardware_flops: float
    """All chips together, recomputation included."""
    collective_bytes: dict[str, float]
    """Sent by one chip, by kind of collective."""
    seconds: dict[str, float]
    """At published rates: compute, memory, interconnect, network between slices, and transfers to
    the host's memory and back."""


@dataclass(frozen=True)
class Plan:
    experiment: Experiment
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    trained: int
    """Of them: the others are frozen."""
    memory: Memory
    model_flops: float
    costs: Costs | None
    compile_seconds: float
    unsharded: dict[str, int]
    """The largest parameters, and arrays of a batch, that every device has in full, in bytes."""
    rows: str
    """Where the rows on which work was counted come from."""

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.memory.peak <= self.memory.memory

    @property
    def step_seconds(self) -> float | None:
        return None if self.costs is None else max(self.costs.seconds.values())

    @property
    def bound(self) -> str | None:
        """Which of the times is the longest."""
        return self.costs and max(self.costs.seconds, key=self.costs.seconds.get)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what all chips could do in that time."""
        if self.costs is None:
            return None
        return self.model_flops / (
            self.topology.chips * self.topology.chip.flops * self.step_seconds
        )

    def json(self) -> dict[str, Any]:
        costs = self.costs
        return {
            "experiment": self.experiment.name,
            "fits": self.fits,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "mesh": self.mesh,
            "rules": {axis: list(mesh_axes(axis)) for axis in RULES if mesh_axes(axis)},
            "unsharded_bytes": self.unsharded,
            "remat": self.experiment.model.remat,
            "attention": self.experiment.model.attention,
            "accumulation": self.experiment.train.accumulation,
            "batch_rows": self.experiment.data.batch_rows,
            "row_length": self.experiment.data.row_length,
            "rows": self.rows,
            "bytes_per_chip": dataclasses.asdict(self.memory),
            "model_flops_per_step": self.model_flops,
            "hardware_flops_per_step": costs and costs.hardware_flops,
            "collective_bytes": costs and costs.collective_bytes,
            "roofline_seconds": costs and costs.seconds,
            "roofline_step_seconds": self.step_seconds,
            "roofline_mfu": self.mfu,
            "compile_seconds": round(self.compile_seconds, 2),
        }


def used_chunks(experiment: Experiment, work: Work) -> float:
    """The share of the chunks of the text loss that hold positions with a target: text, or a code
    of an image. A step's only conditionals skip the others."""
    image, length = experiment.image, experiment.data.row_length
    targets = work.targets + (work.images * image.patches if image.codes else 0)
    chunk = min(experiment.train.vocab_chunk, length)
    return math.ceil(targets / chunk) / math.ceil(length / chunk)


def make_plan(experiment: Experiment, topology: Topology, rows: Rows) -> Plan:
    """Compiles the training step of `experiment` for `topology`; its work is counted on `rows`.

    Raises:
      ValueError: the experiment's mesh does not fit the topology or does not divide what it cuts.
    """
    mesh = make_mesh(experiment.mesh, list(topology.devices))
    planned = blueprint(experiment, mesh)
    experiment = planned.experiment  # with the attention of this platform
    batch = abstract_batch(experiment, mesh)
    begin = time.perf_counter()
    memory, compiled = compile_step(planned, batch, topology)
    seconds = time.perf_counter() - begin
    model = experiment.model
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    together = experiment.data.batch_rows // (experiment.train.accumulation * shards)
    block = model.attention_block or DEFAULT_BLOCK.get(model.attention, 0)
    if model.attention == "chunked":
        heads = model.heads // mesh.shape["tensor"]
        together = rows_together(together, experiment.data.row_length, heads, block)
    work = row_work(rows, block, together)
    costs = None
    if compiled is not None:
        program = read_program(
            compiled.as_text(),
            unknown_trips=work.loop_blocks,
            taken=used_chunks(experiment, work),
        )
        costs = costs_of(program, experiment, topology, work, list(mesh.devices.flat), memory.host)
    parameters = planned.abstract.parameters
    return Plan(
        experiment=experiment,
        topology=topology,
        mesh=dict(mesh.shape),
        parameters=planned.parameters,
        trained=planned.trained,
        memory=memory,
        model_flops=model_flops(
            planned.multiplications, experiment, work, planned.trained_multiplications
        ),
        costs=costs,
        compile_seconds=seconds,
        unsharded=unsharded({"batch": vars(batch), **parameters}),
        rows=rows.origin,
    )


def abstract_batch(experiment: Experiment, mesh: jax.sharding.Mesh) -> Batch:
    """The shapes of a batch, and the placement of its rows."""
    rows = experiment.data.batch_rows
    sharding = batch_sharding(mesh)
    row = pack([], experiment.data.row_length, experiment.image, experiment.image_slots)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=sharding), row
    )


def compile_step(
    planned: Blueprint, batch: Batch, topology: Topology
) -> tuple[Memory, jax.stages.Compiled | None]:
    """The compiled step and its memory; None instead of the step if it does not fit into memory."""
    here = topology.devices_per_chip
    memory = topology.chip.memory
    convolutions = planned.experiment.model.patch_encoder == "unet"
    asked = jax.config.jax_optimization_level != "UNKNOWN"
    step = compiled_step(planned, QUICKLY if convolutions and not asked else None)
    with jax.set_mesh(jax.tree.leaves(planned.abstract)[0].sharding.mesh):
        lowered = step.lower(planned.abstract, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            arguments = sum(map(bytes_here, jax.tree.leaves((planned.abstract, batch))))
            peak = asked_for(str(error), arguments)
            return Memory(here * arguments, here * (peak - arguments), here * peak, memory), None
    said = compiled.memory_analysis()
    results = said.output_size_in_bytes - said.alias_size_in_bytes
    taken = (
        said.argument_size_in_bytes + said.temp_size_in_bytes + said.generated_code_size_in_bytes
    )
    return Memory(
        arguments=here * said.argument_size_in_bytes,
        temporaries=here * said.temp_size_in_bytes,
        peak=here * (taken + results),
        memory=memory,
        host=here * said.host_temp_size_in_bytes,
    ), compiled


def bytes_here(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    size = x.dtype.itemsize
    for n in x.sharding.shard_shape(x.shape):
        size *= n
    return size


def asked_for(message: str, arguments: int) -> int:
    """The memory that a refused program would take, by the compiler's message."""
    number = r"([\d.]+)([KMGT])"
    if used := re.search(rf"Used {number} of [\d.]+[KMGT] hbm", message):
        return int(float(used[1]) * UNITS[used[2]])
    if temporaries := re.search(rf"temporaries \({number}\)", message):
        return arguments + int(float(temporaries[1]) * UNITS[temporaries[2]])
    raise ValueError(f"the compiler refuses the step for another reason than HBM: {message[:500]}")


def costs_of(
    program: Program,
    experiment: Experiment,
    topology: Topology,
    work: RowWork,
    order: list[jax.Device],
    host: int,
) -> Costs:
    """What a compiled step takes, at the topology's rates.

    Args:
      order: the devices as the program numbers them.
      host: bytes of the host's memory that each microbatch fills and empties, for each chip.
    """
    model = experiment.model
    chip = topology.chip
    here = topology.devices_per_chip
    # Each run of a kernel takes one layer of all rows of a microbatch.
    pairs = work.computed_pairs * experiment.data.batch_rows / experiment.train.accumulation
    kernels = sum(
        KERNEL_FLOPS[name] * times * model.width * pairs for name, times in program.kernels.items()
    )
    flops = program.flops * len(order) + kernels

    sent = defaultdict(float)
    links = 0.0
    network = 0.0
    for collective in program.collectives:
        amount = collective.bytes_sent * collective.times
        if collective.between_slices:
            sent[f"{collective.kind} between slices"] += here * amount
            network += here * amount / chip.network
        else:
            sent[collective.kind] += here * amount
            links += amount / topology.link_bandwidth(collective.group, order)
    seconds = {
        "compute": flops / topology.chips / chip.flops,
        "memory": here * program.hbm_bytes / chip.bandwidth,
        "interconnect": links,
        **({"network": network} if topology.slices > 1 else {}),
        **({"host": 2 * host * experiment.train.accumulation / HOST} if host else {}),
    }
    return Costs(flops, dict(sent), seconds)


def unsharded(parameters: Any, most: int = 3) -> dict[str, int]:
    """The largest arrays that no axis of the mesh shards, and their bytes."""
    paths, _ = jax.tree.flatten_with_path(parameters)
    sizes = {
        ".".join(str(key.key) for key in path): bytes_here(x)
        for path, x in paths
        if x.sharding.shard_shape(x.shape) == x.shape
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:most])
