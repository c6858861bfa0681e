"""Other plans for the same training: what would fit where a plan does not, and what would be
fastest.

All of them keep the global batch and the model, so they train the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig
from transfusion_jax.planning.describe import ranked
from transfusion_jax.planning.plan import Plan
from transfusion_jax.planning.topology import Topology, find_topology, larger

Planner = Callable[[Experiment, Topology], Plan]
POLICIES = ("none", "minimal", "attention", "full", "offload")
"""From the one that computes least again to the one that keeps least."""


def remedies(planner: Planner, failed: Plan) -> Iterator[tuple[str, Plan]]:
    """Plans with one change each, as (what to say on the command line, plan): each kind of change
    until one fits."""
    for kind in (_policies, _parts, _more_chips):
        for change, experiment, topology in kind(failed):
            try:
                plan = planner(experiment, topology)
            except ValueError:  # the mesh or the batch cannot be cut so
                continue
            yield change, plan
            if plan.fits:
                break


def _policies(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    experiment = failed.experiment
    for remat in POLICIES[POLICIES.index(experiment.model.remat) + 1 :]:
        changed = replace(experiment, model=replace(experiment.model, remat=remat))
        yield f"--model.remat {remat}", changed, failed.topology


def _parts(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    for parts in parts_of(failed.experiment, failed.mesh):
        if parts > failed.experiment.train.accumulation:
            changed = replace(
                failed.experiment, train=replace(failed.experiment.train, accumulation=parts)
            )
            yield f"--train.accumulation {parts}", changed, failed.topology


def _more_chips(failed: Plan) -> Iterator[tuple[str, Experiment, Topology]]:
    name = failed.topology.name
    # The axis that cuts the parameters takes the new chips.
    experiment = replace(failed.experiment, mesh=MeshConfig(**{**failed.mesh, "fsdp": -1}))
    axes = " ".join(f"--mesh.{axis} {size}" for axis, size in experiment.mesh.axes.items())
    while name := larger(name):
        yield f"--topology {name} {axes}", experiment, find_topology(name, failed.topology.slices)


def parts_of(experiment: Experiment, mesh: dict[str, int]) -> list[int]:
    """Numbers of equal parts that a batch can be cut into on a mesh, by doubling."""
    rows = experiment.data.batch_rows // (mesh["data"] * mesh["fsdp"])
    return [parts for parts in (2**i for i in range(rows.bit_length())) if rows % parts == 0]


def search(planner: Planner, first: Plan) -> Iterator[Plan]:
    """Plans in three steps, each from the best so far: mesh shapes, then remat policies, then parts
    of the batch."""
    best, tried = first, {_what_varies(first.experiment, first.mesh)}
    for step in (_meshes, _remats, _accumulations):
        for changed in step(best):
            if (key := _what_varies(changed, changed.mesh.axes)) in tried:
                continue
            tried.add(key)
            try:
                plan = planner(changed, first.topology)
            except ValueError:  # the mesh divides neither the heads nor the rows, say
                continue
            yield plan
            best = ranked([best, plan])[0]


def _what_varies(experiment: Experiment, axes: dict[str, int]) -> tuple:
    return tuple(axes.items()), experiment.model.remat, experiment.train.accumulation


def _meshes(best: Plan) -> Iterator[Experiment]:
    experiment, topology = best.experiment, best.topology
    devices, rows = (
        len(topology.devices),
        experiment.data.batch_rows // experiment.train.accumulation,
    )
    for tensor in (1, 2, 4, 8):
        for sequence in sorted({1, best.mesh["sequence"]}):
            inner = tensor * sequence
            if devices % inner or experiment.model.num_kv_heads % tensor:
                continue
            for data in sorted({topology.slices, 4 * topology.slices, devices // inner}):
                if devices % (inner * data) == 0 and rows % (devices // inner) == 0:
                    yield replace(
                        experiment,
                        mesh=MeshConfig(data, devices // inner // data, sequence, tensor),
                    )


def _remats(best: Plan) -> Iterator[Experiment]:
    for remat in POLICIES:
        experiment = replace(best.experiment, mesh=MeshConfig(**best.mesh))
        yield replace(experiment, model=replace(experiment.model, remat=remat))


def _accumulations(best: Plan) -> Iterator[Experiment]:
    for parts in parts_of(best.experiment, best.mesh):
        experiment = replace(best.experiment, mesh=MeshConfig(**best.mesh))
        yield replace(experiment, train=replace(experiment.train, accumulation=parts))
