"""Another family of models, through the one interface: it trains, is placed, planned, and
generates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.config import MeshConfig
from transfusion_jax.data.pipeline import Data
from transfusion_jax.generation.engine import Engine
from transfusion_jax.model import build as build_lib
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.interface import Model
from transfusion_jax.model.layers import parameter, product
from transfusion_jax.model.losses import token_losses
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.model.work import model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.planning.rows import row_work, rows_of
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step


class Painter(nnx.Module):
    """Text only, with a loss of its own (the square of a logit's mean), and grey for every
    image."""

    def __init__(self, experiment, rngs):
        config = experiment.model
        D, V = config.width, config.vocab_size
        self.embedding_VD = parameter(rngs.params(), (V, D), ("vocab", "embed"), 0.02)
        self.transformer = Transformer(config, rngs=rngs)
        self.head_DV = parameter(rngs.params(), (D, V), ("embed", "vocab"), D**-0.5)
        self.config, self.image = config, experiment.image

    def _hidden(self, batch):
        intervals = row_intervals(batch, self.image.patches)
        x_BLD = self.embedding_VD[...][batch.tokens_BL]
        return self.transformer(x_BLD, batch.position_BL, intervals)

    def losses(self, batch, noise, vocab_chunk):
        hidden_BLD = self._hidden(batch)
        size_BL = jnp.square(hidden_BLD.mean(-1))
        tokens = token_losses(
            hidden_BLD, batch.text_target_BL, batch.text_weight_BL, self.head_DV[...], vocab_chunk
        )
        return {"text": tokens.cross_entropy_BL, "size": size_BL}

    def weights(self, batch):
        return {"text": batch.text_weight_BL, "size": (batch.segment_BL > 0).astype(jnp.float32)}

    def coefficients(self, train):
        return {"text": 1.0, "size": 0.1}

    def new_cache(self, rows, length):
        return KVCache.zeros(self.config, rows, length)

    def read(self, batch, t_BM, cache):
        intervals = row_intervals(batch, self.image.patches)
        x_BLD = self.embedding_VD[...][batch.tokens_BL]
        start_B = jnp.zeros((len(x_BLD),), jnp.int32)
        return self.transformer.extend(x_BLD, batch.position_BL, intervals, cache, start_B)

    def extend(self, tokens_BT, context):
        offset_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        position_BT = context.length_B[:, None] + offset_T[None, :]
        intervals = Intervals(jnp.zeros_like(position_BT), position_BT + 1)
        x_BTD = self.embedding_VD[...][tokens_BT]
        return self.transformer.extend(
            x_BTD, position_BT, intervals, context.cache, context.length_B
        )

    def logits(self, hidden_BLD):
        return product(hidden_BLD, self.head_DV[...])

    def draw(self, context, guidance, sampling, key_B):
        return jnp.full((len(key_B), *self.image.shape), 0.5), context.cache

    def multiplications(self):
        blocks = jax.tree.leaves(nnx.state(self.transformer.blocks, nnx.Param))
        weights = self.head_DV.shape[0] * self.head_DV.shape[1]
        return {"position": sum(x.size for x in blocks if x.ndim > 2), "target": weights}


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setattr(build_lib, "create", Painter)


def test_what_is_built_is_a_model(experiment):
    assert isinstance(build_lib.build(experiment, 0), Model)


@pytest.mark.slow
def test_another_family_trains_and_generates(painter, experiment, tokenizer):
    mesh_config = MeshConfig(data=1, fsdp=4, tensor=2)
    parted = replace(experiment, mesh=mesh_config, train=replace(experiment.train, accumulation=2))
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        planned = blueprint(parted, mesh)
        step, state = compiled_step(planned), planned.initialise()
        batches, losses = Data(parted, tokenizer).batches(), []
        for number in range(8):
            state, metrics = step(state, jax.device_put(batches[number], batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
            assert float(metrics["image_loss"]) == 0 and losses[-1] > float(metrics["text_loss"])
    assert losses[-1] < losses[0]
    work = row_work(rows_of(batches[0], experiment.image.patches, "by hand"), 0)
    assert model_flops(planned.multiplications, experiment, work) > 0

    parameters = jax.tree.map(np.array, jax.device_get(state.parameters))
    parameters["embedding_VD"] += 1.0
    parameters["head_DV"][:, tokenizer.boi] = 1.0
    engine = Engine(experiment, tokenizer, planned.graph, parameters)
    (spans,) = engine.generate([("a",)])
    np.testing.assert_array_equal(spans[0], np.full(experiment.image.shape, 0.5))
    assert all(isinstance(span, str) for span in spans[1:])
