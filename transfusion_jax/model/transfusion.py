"""Transfusion: one transformer over text tokens and image patches (arXiv 2408.11039, section 3)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import ImageConfig, ModelConfig, SamplerConfig, TrainConfig
from transfusion_jax.diffusion.process import Noise, Process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.interface import Context, Guidance
from transfusion_jax.model.layers import float32_product, parameter
from transfusion_jax.model.losses import image_loss, text_loss
from transfusion_jax.model.patches.encoder import PatchEncoder
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.parallel.rules import constrain, gathered
from transfusion_jax.shapes import BLD, BM, BMhwc

EMBEDDING_SCALE = 0.02  # as in Llama


class Transfusion(nnx.Module):
    """A `Model` of token embedding and patch encoder, transformer, vocabulary projection and patch
    decoder. Images are diffused, text is predicted token by token."""

    def __init__(
        self,
        config: ModelConfig,
        image: ImageConfig,
        process: Process,
        encoder: Callable[..., PatchEncoder],
        *,
        rngs: nnx.Rngs,
    ):
        D, V = config.width, config.vocab_size
        self.embedding_VD = parameter(rngs.params(), (V, D), ("vocab", "embed"), EMBEDDING_SCALE)
        self.patches = encoder(config, image, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.output_DV = parameter(rngs.params(), (D, V), ("embed", "vocab"), D**-0.5)
        self.config, self.image, self.process = config, image, process

    def __call__(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> tuple[BLD, BMhwc]:
        """Hidden states, and the prediction for every image slot.

        Logits are left to `head`; a loss over them never builds all of them.
        """
        x_BLD, carried = self._embed_batch(batch, noisy_BMhwc, t_BM)
        intervals = row_intervals(batch, self.image.patches)
        hidden_BLD = self.transformer(x_BLD, batch.position_BL, intervals)
        at_BQ = self._patch_positions(batch)
        hidden_BQD = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(
            hidden_BLD, at_BQ
        )
        B, M = batch.image_start_BM.shape
        hidden_BMPD = hidden_BQD.reshape(B, M, self.image.patches, -1)
        return hidden_BLD, self.patches.decode(hidden_BMPD, carried)

    def losses(self, batch: Batch, noise: Noise, vocab_chunk: int) -> dict[str, Array]:
        """`text`: cross-entropy of every position. `image`: mean squared error of every slot."""
        noisy_BMhwc = self.process.corrupt(batch.latents_BMhwc, noise.noise_BMhwc, noise.t_BM)
        hidden_BLD, predicted_BMhwc = self(batch, noisy_BMhwc, noise.t_BM)
        target_BMhwc = self.process.target(batch.latents_BMhwc, noise.noise_BMhwc, noise.t_BM)
        with jax.named_scope("text_loss"):
            text_BL = text_loss(hidden_BLD, batch.text_target_BL, self.head(), vocab_chunk)
        with jax.named_scope("image_loss"):
            image_BM = image_loss(
                predicted_BMhwc, target_BMhwc, self.process.loss_weight(noise.t_BM)
            )
        return {"text": text_BL, "image": image_BM}

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"text": batch.text_weight_BL, "image": batch.image_weight_BM}

    def coefficients(self, train: TrainConfig) -> dict[str, float]:
        return {"text": 1.0, "image": train.image_loss_weight}

    def new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache.zeros(self.config, rows, length)

    def read(self, batch: Batch, t_BM: BM, cache: KVCache) -> tuple[BLD, KVCache]:
        """Runs whole rows, their images clean and labelled with timestep t."""
        x_BLD, _ = self._embed_batch(batch, batch.latents_BMhwc, t_BM)
        intervals = row_intervals(batch, self.image.patches)
        start_B = jnp.zeros((len(batch.tokens_BL),), jnp.int32)
        return self.transformer.extend(x_BLD, batch.position_BL, intervals, cache, start_B)

    def extend(self, tokens_BT: Array, context: Context) -> tuple[Array, KVCache]:
        """Runs T tokens after the context, each seeing those before it."""
        position_BT = _positions(context, tokens_BT.shape[1])
        intervals = Intervals(jnp.zeros_like(position_BT), position_BT + 1)
        return self.transformer.extend(
            self.embed(tokens_BT), position_BT, intervals, context.cache, context.length_B
        )

    def denoise(self, x_Bhwc: Array, t: Array, context: Context) -> tuple[Array, KVCache]:
        """Runs one image of every row after the context: the prediction, and the cache with it
        in."""
        start_B = context.length_B
        t_B1 = jnp.broadcast_to(t, (len(start_B), 1))
        x_B1PD, carried = self.patches.encode(x_Bhwc[:, None], t_B1)
        position_BP = _positions(context, self.image.patches)
        end_BP = jnp.broadcast_to((start_B + self.image.patches)[:, None], position_BP.shape)
        intervals = Intervals(jnp.zeros_like(end_BP), end_BP)
        hidden_BPD, cache = self.transformer.extend(
            x_B1PD[:, 0], position_BP, intervals, context.cache, start_B
        )
        return self.patches.decode(hidden_BPD[:, None], carried)[:, 0], cache

    def draw(
        self, context: Context, guidance: Guidance | None, sampling: SamplerConfig, key_B: Array
    ) -> tuple[Array, KVCache]:
        """Denoises P patches in place: each step overwrites the cache entries of the one before."""

        def predict(x_Bhwc, t):
            given, _ = self.denoise(x_Bhwc, t, context)
            if guidance is None:
                return given
            empty, _ = self.denoise(x_Bhwc, t, guidance.empty)
            return guidance.combine(given, empty)

        def noise(i):
            return jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, i), self.image.shape)
            )(key_B)

        steps = sampler(sampling, self.process)
        image_Bhwc = steps.sample(noise(steps.steps), predict, noise)
        # What follows sees the clean image.
        seen_at = jnp.int32(sampling.context_timestep)
        _, cache = self.denoise(image_Bhwc, seen_at, context)
        return image_Bhwc, cache

    def multiplications(self) -> dict[str, int]:
        """Norms and embeddings multiply nothing."""
        blocks = jax.tree.leaves(nnx.state(self.transformer.blocks, nnx.Param))
        return {
            # A norm's scales are [layers, D], all else has more dimensions.
            "position": sum(x.size for x in blocks if x.ndim > 2),
            "target": math.prod(self.output_DV.shape),
            **self.patches.multiplications(),
        }

    def embed(self, tokens_BL: Array) -> Array:
        # Looked up in float32, in which the gradients of a token's many places are then added.
        return gathered(self.embedding_VD, jnp.float32)[tokens_BL].astype(self.config.compute_dtype)

    def head(self) -> Callable[[Array], Array]:
        """From hidden states to logits in float32; made once, its kernel is all-gathered once for
        all calls."""
        kernel_DV = gathered(self.output_DV, jnp.float32)
        return lambda hidden_BLD: float32_product(hidden_BLD, kernel_DV)

    def logits(self, hidden_BLD: Array) -> Array:
        """Logits of every position, in float32."""
        return self.head()(hidden_BLD)

    def _embed_batch(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> tuple[BLD, Any]:
        """What enters the transformer, patch vectors where the images are, and what the patch
        encoder carries around it."""
        at_BQ = self._patch_positions(batch)
        vectors_BMPD, carried = self.patches.encode(noisy_BMhwc, t_BM)
        x_BLD = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))(
            self.embed(batch.tokens_BL), at_BQ, vectors_BMPD.reshape(*at_BQ.shape, -1)
        )
        return constrain(x_BLD, "batch", "residual", None), carried

    def _patch_positions(self, batch: Batch) -> Array:
        """Positions [B, Q], Q = M * P, of all patches of a row; those of empty slots lie past its
        end."""
        offset_P = jnp.arange(self.image.patches, dtype=jnp.int32)
        at_BMP = batch.image_start_BM[:, :, None] + offset_P[None, None, :]
        return at_BMP.reshape(at_BMP.shape[0], -1)


def _positions(context: Context, count: int) -> Array:
    """The next `count` positions of each row."""
    return context.length_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
