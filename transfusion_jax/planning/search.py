"""Other plans for the same training: what would fit if a plan does not, and what would be fastest.

All of them keep the global batch and the model, so they train the same thing.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, ModelConfig
from transfusion_jax.planning.describe import ranked
from transfusion_jax.planning.plan import Plan
from transfusion_jax.planning.topology import Topology, find_topology, larger

Planner = Callable[[Experiment, Topology], Plan]
POLICIES = ("none", "minimal", "attention", "full", "offload")
"""From least recomputation to least memory."""


def remedies(planner: Planner, failed: Plan) -> Iterator[tuple[str, Plan]]:
    """(flags, plan) of plans with one change each; each kind of change is tried until one fits."""
    for kind in (_policies, _microbatches, _more_chips):
        for change, experiment, topology in kind(failed):
            try:
                plan = planner(experiment, topology)
            except ValueError:  # the mesh or the batch cannot be divided this way
                continue
            yield change, plan
            if plan.fits:
                break


def _policies(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    experiment = failed.experiment
    for remat in POLICIES[POLICIES.index(experiment.model.remat) + 1 :]:
        changed = replace(experiment, model=_remat(experiment.model, remat))
        loop = " --model.layer-loop auto" if experiment.model.layer_loop == "unroll" else ""
        yield f"--model.remat {remat}{loop}", changed, failed.topology


def _microbatches(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    experiment = failed.experiment
    for number in microbatch_counts(experiment, failed.mesh):
        if number > experiment.train.accumulation:
            changed = replace(experiment, train=replace(experiment.train, accumulation=number))
            yield f"--train.accumulation {number}", changed, failed.topology


def _more_chips(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    name = failed.topology.name
    # The axis that shards the parameters takes the new chips.
    experiment = replace(failed.experiment, mesh=MeshConfig(**{**failed.mesh, "fsdp": -1}))
    axes = " ".join(f"--mesh.{axis} {size}" for axis, size in experiment.mesh.axes.items())
    while name := larger(name):
        yield f"--topology {name} {axes}", experiment, find_topology(name, failed.topology.slices)


def microbatch_counts(experiment: Experiment, mesh: dict[str, int]) -> list[int]:
    """All that divide the rows of a device."""
    rows = experiment.data.batch_rows // (mesh["data"] * mesh["fsdp"])
    return [number for number in range(1, rows + 1) if rows % number == 0]


def search(planner: Planner, first: Plan) -> Iterator[Plan]:
    """Varies what is recomputed and in how many microbatches, then the mesh; yields each plan.

    Not all are compiled. Where computing limits a plan that fits, more recomputation on its mesh is
    no faster; more microbatches than fit only send more; and the memory that a plan lacked tells
    how many microbatches are too few. Other meshes are tried for as long as something else than
    computing limits the best plan, or nothing fits: one that would leave room for less
    recomputation is for the user to name.
    """
    found = {_what_varies(first.experiment, first.mesh): first}
    for experiment in itertools.chain(_recomputations(first, found), _meshes(found)):
        key = _what_varies(experiment, experiment.mesh.axes)
        if key in found:
            continue
        try:
            found[key] = planner(experiment, first.topology)
        except ValueError:  # for example, the mesh does not divide the heads
            continue
        yield found[key]


def _what_varies(experiment: Experiment, axes: dict[str, int]) -> tuple:
    return tuple(axes.items()), experiment.model.remat, experiment.train.accumulation


def _recomputations(first: Plan, found: dict[tuple, Plan]) -> Iterator[Experiment]:
    """Policies from least recomputation, each in the fewest microbatches that fit."""
    experiment = replace(first.experiment, mesh=MeshConfig(**first.mesh))
    for remat in POLICIES:
        lacking = None
        for number in microbatch_counts(experiment, first.mesh):
            if lacking and _too_few(number, lacking):
                continue
            candidate = replace(
                experiment,
                model=_remat(experiment.model, remat),
                train=replace(experiment.train, accumulation=number),
            )
            yield candidate
            plan = found.get(_what_varies(candidate, first.mesh))
            if plan and plan.fits:
                if plan.bound == "compute":
                    return
                break
            lacking = plan


def _too_few(number: int, lacking: Plan) -> bool:
    """Whether so many microbatches cannot fit, by what a plan in fewer of them takes.

    Temporaries shrink with the microbatch, gradients among them do not; a fifth is left for how
    the compiler arranges them.
    """
    memory = lacking.memory
    share = lacking.experiment.train.accumulation / number
    return memory.arguments + 0.8 * share * memory.temporaries > memory.memory


def _meshes(found: dict[tuple, Plan]) -> Iterator[Experiment]:
    """Other meshes for the best plan so far, until computing limits it."""

    def best() -> Plan:
        return ranked(list(found.values()))[0]

    for experiment in _other_meshes(best()):
        if best().fits and best().bound == "compute":
            return
        yield experiment


def _other_meshes(plan: Plan) -> Iterator[Experiment]:
    experiment, topology = plan.experiment, plan.topology
    devices = len(topology.devices)
    rows = experiment.data.batch_rows // experiment.train.accumulation
    for tensor in (1, 2, 4, 8):
        for sequence in sorted({1, plan.mesh["sequence"]}):
            inner = tensor * sequence
            if devices % inner or experiment.model.num_kv_heads % tensor:
                continue
            for data in sorted({topology.slices, 4 * topology.slices, devices // inner}):
                if devices % (inner * data) == 0 and rows % (devices // inner) == 0:
                    yield replace(
                        experiment,
                        mesh=MeshConfig(data, devices // inner // data, sequence, tensor),
                    )


def _remat(model: ModelConfig, remat: str) -> ModelConfig:
    """The model under another policy; not every policy takes layers that are written out."""
    return replace(model, remat=remat, layer_loop="auto")
