"""An engine with random weights, and what the same model says without a cache."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.engine import Engine
from transfusion_jax.model.build import build


def random_engine(experiment: Experiment, tokenizer: Tokenizer) -> Engine:
    """Of a model whose images depend on what comes before them."""
    net = build(experiment, 3)
    net.patches.out_DZ[...] = 0.3 * jax.random.normal(jax.random.key(1), net.patches.out_DZ.shape)
    graph, parameters = nnx.split(net, nnx.Param)
    return Engine(experiment, tokenizer, graph, nnx.to_pure_dict(parameters))


def liking(engine, token, amount=1.0):
    """The engine with a token made likelier everywhere: hidden states are pushed to a direction
    that it reads."""
    parameters = jax.tree.map(jnp.asarray, engine.parameters)
    output = parameters["output_DV"].at[:, token].set(amount)
    embedding = parameters["embedding_VD"] + 1.0
    return replace(
        engine, parameters={**parameters, "output_DV": output, "embedding_VD": embedding}
    )


def uncached(engine, spans):
    """Logits after an unfinished document, run in one piece as in training."""
    document = sequence(Document(tuple(spans)), engine.tokenizer, engine.experiment.image.patches)
    row = pack([(document, 0, len(document.tokens))], 96, engine.experiment.image)
    batch = jax.tree.map(jnp.asarray, stack([row]))
    t = jnp.full_like(batch.image_start_BM, engine.experiment.sampler.context_timestep)
    return all_logits(engine.graph, engine.parameters, batch, t)[0, len(document.tokens) - 1]


@functools.partial(jax.jit, static_argnums=0)
def all_logits(graph, parameters, batch, t_BM):
    model = nnx.merge(graph, parameters)
    return model.logits(model(batch, batch.latents_BMhwc, t_BM)[0])
