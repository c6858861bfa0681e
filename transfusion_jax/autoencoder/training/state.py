"""What autoencoder training changes: the autoencoder, its discriminator, the use of its codes."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training.losses import Discriminator
from transfusion_jax.autoencoder.vae import abstract_autoencoder, build
from transfusion_jax.parallel.rules import replicated
from transfusion_jax.training.state import initial_fields, initialise, with_shardings
from transfusion_jax.training.update import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The fields of `training.state.State`, and those of an autoencoder; None where it has none."""

    step: Array
    parameters: Any
    ema: Any
    optimizer: Any
    discriminator: Any
    discriminator_optimizer: Any
    counts: Array | None
    """[codes]: how often each code was used since codes were last revived."""
    skipped: Array
    skipped_in_a_row: Array


@dataclass(frozen=True)
class Blueprint:
    """What a state looks like before it exists."""

    experiment: AutoencoderExperiment
    graph: nnx.GraphDef
    discriminator_graph: nnx.GraphDef | None
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None
    abstract: State | None = None
    """Shapes and dtypes; every device has all of every array, and a part of the batch."""

    def initialise(self) -> State:
        """The state of step 0, on its devices."""
        return initialise(functools.partial(initial_state, self), self.abstract)

    @property
    def parameters(self) -> int:
        """How many numbers the autoencoder has."""
        return sum(x.size for x in jax.tree.leaves(self.abstract.parameters))


def blueprint(experiment: AutoencoderExperiment, mesh: Mesh) -> Blueprint:
    """Plans the state of an experiment on a mesh, without making any array."""
    steps = experiment.train.steps
    graph, parameters = abstract_autoencoder(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, steps, parameters)
    discriminator_graph = None
    discriminator_optimizer = None
    if experiment.loss.gan:
        discriminator_graph, parameters = _abstract_discriminator(experiment)
        discriminator_optimizer = make_optimizer(
            experiment.optimizer, steps, parameters, experiment.loss.gan_start
        )
    unplaced = Blueprint(experiment, graph, discriminator_graph, optimizer, discriminator_optimizer)
    shapes = jax.eval_shape(functools.partial(initial_state, unplaced))
    everywhere = jax.tree.map(lambda _: replicated(mesh), shapes)
    return replace(unplaced, abstract=with_shardings(shapes, everywhere))


def initial_state(blueprint: Blueprint) -> State:
    """Step 0, drawn from the experiment's seed."""
    experiment = blueprint.experiment
    parameters = _pure(build(experiment.model, experiment.train.seed))
    discriminator = None
    discriminator_optimizer = None
    if experiment.loss.gan:
        discriminator = _pure(_discriminator(experiment))
        discriminator_optimizer = blueprint.discriminator_optimizer.init(discriminator)
    revives = experiment.model.kind == "vq" and experiment.loss.revive_codes
    return State(
        **initial_fields(parameters, blueprint.optimizer),
        discriminator=discriminator,
        discriminator_optimizer=discriminator_optimizer,
        counts=jnp.zeros(experiment.model.codes, jnp.int32) if revives else None,
    )


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _discriminator(experiment: AutoencoderExperiment) -> Discriminator:
    return Discriminator(
        experiment.model.channels,
        experiment.loss.discriminator_width,
        experiment.loss.discriminator_layers,
        rngs=nnx.Rngs(params=experiment.train.seed + 1),
    )


def _abstract_discriminator(experiment: AutoencoderExperiment) -> tuple[nnx.GraphDef, nnx.State]:
    graphs = []

    def parameters():
        graph, state = nnx.split(_discriminator(experiment), nnx.Param)
        graphs.append(graph)
        return state

    state = jax.eval_shape(parameters)
    return graphs.pop(), state
