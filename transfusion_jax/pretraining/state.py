"""What pretraining changes, and where each part of it lives: one Transfusion model on a mesh."""

import functools
from dataclasses import dataclass, replace

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from transfusion_jax.config import Experiment
from transfusion_jax.model.attention.platforms import DEFAULT_BLOCK, for_platform
from transfusion_jax.model.build import abstract_model, build
from transfusion_jax.parallel.mesh import check_rows
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.training.frozen import frozen_names, without
from transfusion_jax.training.state import State, initial_fields, initialise, place
from transfusion_jax.training.update import make_optimizer


@dataclass(frozen=True)
class Blueprint:
    """What a state looks like before it exists: structure, shapes, placement."""

    experiment: Experiment
    """With the attention that suits the mesh's devices."""
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: State
    """Shapes and dtypes, with their shardings."""
    frozen: frozenset[str] = frozenset()
    """Dotted names of the parameters that are not trained."""

    def initialise(self) -> State:
        """The state of step 0, each array made on the devices that keep it."""
        make = functools.partial(initial_state, self.experiment, self.optimizer)
        return initialise(make, self.abstract)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(x.size for x in jax.tree.leaves(self.abstract.parameters))

    @property
    def trained(self) -> int:
        """How many of them change."""
        return sum(x.size for x in jax.tree.leaves(without(self.abstract.parameters, self.frozen)))

    @functools.cached_property
    def multiplications(self) -> dict[str, int]:
        """As `Model.multiplications`."""
        return nnx.merge(self.graph, self.abstract.parameters).multiplications()

    @functools.cached_property
    def trained_multiplications(self) -> dict[str, int]:
        """`multiplications` of the weights that are trained."""
        if not self.frozen:
            return self.multiplications

        def emptied(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = ".".join(str(part.key) for part in path)
            return jax.ShapeDtypeStruct((0,) * x.ndim, x.dtype) if name in self.frozen else x

        trained = jax.tree.map_with_path(emptied, self.abstract.parameters)
        return nnx.merge(self.graph, trained).multiplications()


def blueprint(experiment: Experiment, mesh: Mesh) -> Blueprint:
    """Plans the state of an experiment on a mesh, without making any array.

    Raises:
      ValueError: the mesh does not divide a parameter or the batch, or the model asks for what its
        devices cannot run, or what is frozen is not in it.
    """
    check_rows(mesh, experiment.data.batch_rows, parts=experiment.train.accumulation)
    parts = mesh.shape["sequence"] * mesh.shape["tensor"]
    if experiment.data.row_length % parts:
        raise ValueError(
            f"mesh.sequence * mesh.tensor = {parts} must divide "
            f"data.row_length={experiment.data.row_length}"
        )
    model = for_platform(experiment.model, mesh.devices.flat[0].platform)
    experiment = replace(experiment, model=model)
    if model.attention == "pallas":
        _check_blocks(experiment, mesh)
    graph, parameters = abstract_model(experiment)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(parameters)]
    frozen = frozen_names(names, experiment.train.freeze)
    steps = experiment.train.steps
    optimizer = make_optimizer(experiment.optimizer, steps, parameters, frozen=frozen)
    shapes = jax.eval_shape(functools.partial(initial_state, experiment, optimizer))
    abstract = place(shapes, parameter_shardings(parameters, mesh), mesh)
    return Blueprint(experiment, graph, optimizer, abstract, frozen)


def _check_blocks(experiment: Experiment, mesh: Mesh) -> None:
    """Raises ValueError if a microbatch may have more pairs of blocks than the kernel's list."""
    from transfusion_jax.model.attention.block_sums import check_pairs  # imports Pallas

    block = experiment.model.attention_block or DEFAULT_BLOCK["pallas"]
    length = experiment.data.row_length
    rows = experiment.data.batch_rows // experiment.train.accumulation
    check_pairs(
        rows // (mesh.shape["data"] * mesh.shape["fsdp"]),
        -(-length // mesh.shape["sequence"] // block),
        -(-length // block),
        block,
    )


def initial_state(experiment: Experiment, optimizer: optax.GradientTransformation) -> State:
    """Step 0, with parameters drawn from the experiment's seed."""
    return State(**initial_fields(drawn_parameters(experiment), optimizer))


def drawn_parameters(experiment: Experiment) -> dict:
    """The parameters of step 0, drawn from the experiment's seed."""
    return nnx.to_pure_dict(nnx.state(build(experiment, experiment.train.seed), nnx.Param))
