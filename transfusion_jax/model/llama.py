"""Llama: the same transformer on text alone (Touvron et al. 2023, arXiv 2307.09288), a baseline.

With query-key norm, post-norm and z-loss, each a switch of its own, it is the middle row of Table
4: Chameleon's stability changes without its images.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import ModelConfig, SamplerConfig, TrainConfig
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.attention.intervals import row_intervals
from transfusion_jax.model.interface import Context, Guidance
from transfusion_jax.model.token_model import (
    TokenModel,
    block_multiplications,
    embedding,
    output,
)
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.shapes import BLD, BM


class Llama(TokenModel):
    """A `Model` of text alone; rows have no images."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding_VD = embedding(config, config.vocab_size, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.output_DV = output(config, config.vocab_size, rngs=rngs)
        self.config = config

    def losses(self, batch: Batch, noise: Noise, vocab_chunk: int) -> dict[str, Array]:
        """`text`: cross-entropy of every position with a target, 0 elsewhere. `z`: its z-loss."""
        x_BLD = self.embed(batch.tokens_BL)
        hidden_BLD = self.transformer(x_BLD, batch.position_BL, row_intervals(batch, 1))
        found = self.token_losses(
            hidden_BLD, batch.text_target_BL, batch.text_weight_BL, vocab_chunk
        )
        return {"text": found.cross_entropy_BL, "z": jnp.square(found.log_z_BL)}

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"text": batch.text_weight_BL, "z": batch.text_weight_BL}

    def coefficients(self, train: TrainConfig) -> dict[str, float]:
        return {"text": 1.0, "z": train.z_loss}

    def read(self, batch: Batch, t_BM: BM, cache: KVCache) -> tuple[BLD, KVCache]:
        x_BLD = self.embed(batch.tokens_BL)
        return self.read_vectors(x_BLD, batch.position_BL, row_intervals(batch, 1), cache)

    def draw(
        self, context: Context, guidance: Guidance | None, sampling: SamplerConfig, key_B: Array
    ) -> Array:
        raise AssertionError("BOI is never written, so nothing is drawn")

    def show(self, image_Bhwc: Array, context: Context, timestep: int) -> KVCache:
        raise AssertionError("nothing is drawn, so there is nothing to show")

    def multiplications(self) -> dict[str, int]:
        return {
            "position": block_multiplications(self.transformer.blocks),
            "target": math.prod(self.output_DV.shape),
        }
