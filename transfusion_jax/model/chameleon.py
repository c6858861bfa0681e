"""Chameleon: images are the codes of a VQ autoencoder, and tokens like any other (arXiv
2405.09818), the paper's baseline.

One softmax over text tokens and codes, one loss over all of them, attention causal. What makes its
training stable is separate: `model.qk_norm`, `model.norm_placement` and `train.z_loss`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import ImageConfig, ModelConfig, SamplerConfig, TrainConfig
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.attention.intervals import row_intervals
from transfusion_jax.model.interface import Context, Guidance
from transfusion_jax.model.layers import float32_product
from transfusion_jax.model.token_model import (
    TokenModel,
    block_multiplications,
    embedding,
    output,
    patch_positions,
)
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.parallel.gathers import gathered
from transfusion_jax.shapes import BLD, BM


class Chameleon(TokenModel):
    """A `Model` whose images [h, w, 1] hold code numbers; code k is token `vocab_size` + k.

    `<s> cat BOI 7 7 2 5 EOI </s>` learns, at BOI and at all codes but the last, the next code. EOI
    is given, never predicted, as in Transfusion.
    """

    def __init__(self, config: ModelConfig, image: ImageConfig, *, rngs: nnx.Rngs):
        tokens = config.vocab_size + image.codes
        self.embedding_VD = embedding(config, tokens, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.output_DV = output(config, tokens, rngs=rngs)
        self.config, self.image = config, image

    def losses(self, batch: Batch, noise: Noise, vocab_chunk: int) -> dict[str, Array]:
        """`text` and `image`: cross-entropy of every position with a target, 0 elsewhere, to be
        averaged over targets that are text or codes. `token`: of both. `z`: their z-loss."""
        tokens_BL = self._tokens(batch)
        hidden_BLD = self.transformer(
            self.embed(tokens_BL), batch.position_BL, row_intervals(batch, 1)
        )
        next_BL = jnp.pad(tokens_BL[:, 1:], ((0, 0), (0, 1)))
        target_BL = jnp.where(self._code_follows(batch) > 0, next_BL, batch.text_target_BL)
        found = self.token_losses(hidden_BLD, target_BL, self.weights(batch)["token"], vocab_chunk)
        loss_BL = found.cross_entropy_BL
        return {
            "text": loss_BL,
            "image": loss_BL,
            "token": loss_BL,
            "z": jnp.square(found.log_z_BL),
        }

    def weights(self, batch: Batch) -> dict[str, Array]:
        text_BL, code_BL = batch.text_weight_BL, self._code_follows(batch)
        return {
            "text": text_BL,
            "image": code_BL,
            "token": text_BL + code_BL,
            "z": text_BL + code_BL,
        }

    def coefficients(self, train: TrainConfig) -> dict[str, float]:
        return {"token": 1.0, "z": train.z_loss}

    def read(self, batch: Batch, t_BM: BM, cache: KVCache) -> tuple[BLD, KVCache]:
        x_BLD = self.embed(self._tokens(batch))
        return self.read_vectors(x_BLD, batch.position_BL, row_intervals(batch, 1), cache)

    def draw(
        self, context: Context, guidance: Guidance | None, sampling: SamplerConfig, key_B: Array
    ) -> Array:
        """Writes P codes, one after another; guidance is on their logits."""

        def step(i, carry):
            codes_BP, contexts = carry
            logits = [self.code_logits(c.hidden_BD[:, None])[:, 0] for c in contexts]
            logits_BK = logits[0] if guidance is None else guidance.combine(*logits)
            if sampling.image_temperature == 0:
                code_B = jnp.argmax(logits_BK, axis=-1)
            else:
                fold = jax.vmap(jax.random.fold_in, (0, None))
                scaled = logits_BK / sampling.image_temperature
                code_B = jax.vmap(jax.random.categorical)(fold(key_B, i), scaled)
            token_B = self.config.vocab_size + code_B.astype(jnp.int32)
            contexts = tuple(self._followed(c, token_B) for c in contexts)
            return codes_BP.at[:, i].set(code_B.astype(jnp.float32)), contexts

        codes_BP = jnp.zeros((len(key_B), self.image.patches))
        contexts = (context,) if guidance is None else (context, guidance.empty)
        codes_BP, _ = jax.lax.fori_loop(0, self.image.patches, step, (codes_BP, contexts))
        return codes_BP.reshape(-1, *self.image.shape)

    def show(self, image_Bhwc: Array, context: Context, timestep: int) -> KVCache:
        codes_BP = image_Bhwc.astype(jnp.int32).reshape(len(image_Bhwc), -1)
        _, cache = self.extend(self.config.vocab_size + codes_BP, context)
        return cache

    def multiplications(self) -> dict[str, int]:
        """Logits of a code are those of its position, the one before it."""
        head = math.prod(self.output_DV.shape)
        return {
            "position": block_multiplications(self.transformer.blocks),
            "target": head,
            "patch": head,
        }

    def _followed(self, context: Context, token_B: Array) -> Context:
        hidden_B1D, cache = self.extend(token_B[:, None], context)
        return Context(cache, context.length_B + 1, hidden_B1D[:, 0])

    def code_logits(self, hidden_BLD: Array) -> Array:
        """As `logits`, of the codes."""
        kernel_DV = gathered(self.output_DV, jnp.float32)[:, self.config.vocab_size :]
        return float32_product(hidden_BLD, kernel_DV)

    def _tokens(self, batch: Batch) -> Array:
        """Tokens [B, L], codes where the images are."""
        code_BQ = batch.latents_BMhwc.astype(jnp.int32).reshape(batch.tokens_BL.shape[0], -1)
        at_BQ = patch_positions(batch.image_start_BM, self.image.patches)
        return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(
            batch.tokens_BL, at_BQ, self.config.vocab_size + code_BQ
        )

    def _code_follows(self, batch: Batch) -> Array:
        """[B, L]: 1 where the next token is a code, 0 elsewhere."""
        at_BQ = patch_positions(batch.image_start_BM, self.image.patches) - 1
        # The position before an empty slot is the last of the row, which nothing follows.
        at_BQ = jnp.where(at_BQ + 1 < batch.tokens_BL.shape[1], at_BQ, batch.tokens_BL.shape[1])
        return jax.vmap(lambda row, at: row.at[at].set(1.0, mode="drop"))(
            jnp.zeros(batch.tokens_BL.shape), at_BQ
        )
