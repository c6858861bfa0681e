"""From an experiment to its model: the only place that chooses classes."""

import jax
from flax import nnx
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.diffusion.process import process
from transfusion_jax.model.chameleon import Chameleon
from transfusion_jax.model.interface import Model
from transfusion_jax.model.llama import Llama
from transfusion_jax.model.patches.linear import LinearPatches
from transfusion_jax.model.patches.unet import UNetPatches
from transfusion_jax.model.transfusion import Transfusion


def create(experiment: Experiment, rngs: nnx.Rngs) -> Model:
    """A model of the family, and with the parts, that the experiment names."""
    model, image = experiment.model, experiment.image
    if model.family == "llama":
        return Llama(model, rngs=rngs)
    if model.family == "chameleon":
        return Chameleon(model, image, rngs=rngs)
    encoder = {"linear": LinearPatches, "unet": UNetPatches}[model.patch_encoder]
    return Transfusion(model, image, process(experiment.diffusion), encoder, rngs=rngs)


def build(experiment: Experiment, seed: int | Array) -> Model:
    """A freshly initialised model; under `jax.eval_shape` it costs nothing at any size."""
    return create(experiment, nnx.Rngs(params=seed))


def abstract_model(experiment: Experiment) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of the model, and its parameters as shapes with logical axis names; nothing is
    allocated.

    (Not `nnx.eval_shape`, which under a mesh would take the logical names for mesh axes.)
    """
    graphs = []

    def parameters():
        graph, state = nnx.split(build(experiment, 0), nnx.Param)
        graphs.append(graph)
        return state

    state = jax.eval_shape(parameters)
    return graphs.pop(), state
