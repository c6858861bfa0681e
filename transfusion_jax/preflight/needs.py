"""What a run needs of its devices and disk, from the shapes and placement of its state."""

from dataclasses import dataclass

import jax

from transfusion_jax.config import Experiment
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.processes import check_collectives
from transfusion_jax.planning.plan import bytes_here
from transfusion_jax.pretraining.state import blueprint


@dataclass(frozen=True)
class Needs:
    """What a state takes; nothing is known of it where the mesh does not suit the devices."""

    problem: str | None = None
    """Why the mesh does not suit the devices, the rows or the model; None if it does."""
    mesh: str = ""
    state: int = 0
    """Bytes on one device: parameters, average and moments in float32."""
    checkpoint: int = 0
    """Bytes of one checkpoint."""


def needs_of(experiment: Experiment) -> Needs:
    """What an experiment needs of the devices of all processes."""
    try:
        mesh = make_mesh(experiment.mesh)
        check_collectives(mesh)
        arrays = jax.tree.leaves(blueprint(experiment, mesh).abstract)
    except ValueError as error:
        return Needs(problem=str(error))
    cut = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
    return Needs(
        mesh=", ".join(cut) or "one device",
        state=sum(map(bytes_here, arrays)),
        checkpoint=sum(x.size * x.dtype.itemsize for x in arrays),
    )
