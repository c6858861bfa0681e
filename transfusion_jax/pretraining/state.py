"""All that training changes, as one frozen pytree, and where each part of it lives."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.config import Experiment
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.build import abstract_model, build
from transfusion_jax.parallel.mesh import check_rows
from transfusion_jax.parallel.rules import parameter_shardings, replicated
from transfusion_jax.training.update import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Random keys are not part of it: they are folded from (seed, step, row)."""

    step: Array
    """Steps taken, skipped ones included; also the index of the next batch."""
    parameters: Any
    ema: Any
    """Exponential moving average of the parameters, which is sampled and evaluated."""
    optimizer: Any
    skipped: Array
    """Steps whose gradients were not finite, in all."""
    skipped_in_a_row: Array


@dataclass(frozen=True)
class Blueprint:
    """What a state looks like before it exists: structure, shapes, placement."""

    experiment: Experiment
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: State
    """Shapes and dtypes, with their shardings."""

    def initialise(self) -> State:
        """A fresh state, every array made on the devices that keep it."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(
            functools.partial(_fresh, self.experiment, self.optimizer), out_shardings=shardings
        )()


def blueprint(experiment: Experiment, mesh: Mesh) -> Blueprint:
    """Plans the state of an experiment on a mesh, without making any array.

    Raises:
      ValueError: the mesh does not divide a parameter or the batch, or the model asks for what its devices cannot run.
    """
    check_rows(mesh, experiment.data.batch_rows, parts=experiment.train.accumulation)
    parts = mesh.shape["sequence"] * mesh.shape["tensor"]
    if experiment.data.row_length % parts:
        raise ValueError(
            f"mesh.sequence * mesh.tensor = {parts} must divide data.row_length={experiment.data.row_length}"
        )
    model = for_platform(experiment.model, mesh.devices.flat[0].platform)
    experiment = replace(experiment, model=model)
    graph, parameters = abstract_model(experiment)
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps, parameters)
    shardings = parameter_shardings(parameters, mesh)
    shapes = jax.eval_shape(functools.partial(_fresh, experiment, optimizer))
    whole = replicated(mesh)
    placed = State(
        step=whole, parameters=shardings, ema=shardings, skipped=whole, skipped_in_a_row=whole,
        optimizer=optax.tree_utils.tree_map_params(
            optimizer, lambda _, sharding: sharding, shapes.optimizer, shardings, transform_non_params=lambda _: whole
        ),
    )  # fmt: skip
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )
    return Blueprint(experiment, graph, optimizer, abstract)


def _fresh(experiment: Experiment, optimizer: optax.GradientTransformation) -> State:
    """Step 0, with its parameters drawn from the experiment's seed."""
    parameters = nnx.to_pure_dict(nnx.state(build(experiment, experiment.train.seed), nnx.Param))
    zero = jnp.zeros((), jnp.int32)
    # The copy keeps parameters and average apart, so that the step can take over both buffers.
    return State(
        zero, parameters, jax.tree.map(jnp.copy, parameters), optimizer.init(parameters), zero, zero
    )
