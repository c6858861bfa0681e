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
from transfusion_jax.model.losses import image_loss
from transfusion_jax.model.patches.encoder import PatchEncoder
from transfusion_jax.model.token_model import (
    TokenModel,
    block_multiplications,
    embedding,
    next_positions,
    output,
    patch_positions,
)
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.parallel.rules import constrain
from transfusion_jax.shapes import BLD, BM, BMhwc


class Transfusion(TokenModel):
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
        self.embedding_VD = embedding(config, config.vocab_size, rngs=rngs)
        self.patches = encoder(config, image, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.output_DV = output(config, config.vocab_size, rngs=rngs)
        self.config, self.image, self.process = config, image, process
        self.mutual_patches = config.mutual_patches(image)

    def __call__(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> tuple[BLD, BMhwc]:
        """Hidden states, and the prediction for every image slot.

        Logits are left to `head`; a loss over them never builds all of them.
        """
        x_BLD, carried = self._embed_batch(batch, noisy_BMhwc, t_BM)
        intervals = row_intervals(batch, self.mutual_patches)
        hidden_BLD = self.transformer(x_BLD, batch.position_BL, intervals, self._images(batch))
        at_BQ = patch_positions(batch.image_start_BM, self.image.patches)
        hidden_BQD = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(
            hidden_BLD, at_BQ
        )
        B, M = batch.image_start_BM.shape
        hidden_BMPD = hidden_BQD.reshape(B, M, self.image.patches, -1)
        return hidden_BLD, self.patches.decode(hidden_BMPD, carried)

    def losses(self, batch: Batch, noise: Noise, vocab_chunk: int) -> dict[str, Array]:
        """`text`: cross-entropy of every position with a text target, 0 elsewhere. `image`: mean
        squared error of every slot. `z`: the z-loss of positions with a text target."""
        noisy_BMhwc = self.process.corrupt(batch.latents_BMhwc, noise.noise_BMhwc, noise.t_BM)
        hidden_BLD, predicted_BMhwc = self(batch, noisy_BMhwc, noise.t_BM)
        target_BMhwc = self.process.target(batch.latents_BMhwc, noise.noise_BMhwc, noise.t_BM)
        with jax.named_scope("text_loss"):
            text = self.token_losses(
                hidden_BLD, batch.text_target_BL, batch.text_weight_BL, vocab_chunk
            )
        with jax.named_scope("image_loss"):
            image_BM = image_loss(
                predicted_BMhwc, target_BMhwc, self.process.loss_weight(noise.t_BM)
            )
        z_BL = jnp.square(text.log_z_BL)
        return {"text": text.cross_entropy_BL, "image": image_BM, "z": z_BL}

    def weights(self, batch: Batch) -> dict[str, Array]:
        text_BL = batch.text_weight_BL
        return {"text": text_BL, "image": batch.image_weight_BM, "z": text_BL}

    def coefficients(self, train: TrainConfig) -> dict[str, float]:
        return {"text": 1.0, "image": train.image_loss_weight, "z": train.z_loss}

    def read(self, batch: Batch, t_BM: BM, cache: KVCache) -> tuple[BLD, KVCache]:
        """Runs whole rows, their images clean and labelled with timestep t."""
        x_BLD, _ = self._embed_batch(batch, batch.latents_BMhwc, t_BM)
        intervals = row_intervals(batch, self.mutual_patches)
        return self.read_vectors(x_BLD, batch.position_BL, intervals, cache, self._images(batch))

    def denoise(self, x_Bhwc: Array, t: Array, context: Context) -> tuple[Array, KVCache]:
        """Runs one image of every row after the context: the prediction, and the cache with it
        in."""
        start_B = context.length_B
        t_B1 = jnp.broadcast_to(t, (*start_B.shape, 1))
        x_B1PD, carried = self.patches.encode(x_Bhwc[:, None], t_B1)
        position_BP = next_positions(context, self.image.patches)
        if self.mutual_patches > 1:
            end_BP = jnp.broadcast_to((start_B + self.image.patches)[:, None], position_BP.shape)
        else:
            end_BP = position_BP + 1
        intervals = Intervals(jnp.zeros_like(end_BP), end_BP)
        hidden_BPD, cache = self.transformer.extend(
            x_B1PD[:, 0], position_BP, intervals, context.cache, start_B, image_BT=True
        )
        return self.patches.decode(hidden_BPD[:, None], carried)[:, 0], cache

    def draw(
        self, context: Context, guidance: Guidance | None, sampling: SamplerConfig, key_B: Array
    ) -> Array:
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
        return steps.sample(noise(steps.steps), predict, noise)

    def show(self, image_Bhwc: Array, context: Context, timestep: int) -> KVCache:
        _, cache = self.denoise(image_Bhwc, jnp.int32(timestep), context)
        return cache

    def multiplications(self) -> dict[str, int]:
        """Norms and embeddings multiply nothing. In a mixture, a patch multiplies the weights of
        images, and not those of text."""
        each = self.patches.multiplications()
        position = block_multiplications(self.transformer.blocks)
        if self.transformer.mixture:
            each["patch"] += block_multiplications(self.transformer.image_blocks) - position
        return {"position": position, "target": math.prod(self.output_DV.shape), **each}

    def _images(self, batch: Batch) -> Array:
        """[B, L]: whether a position is a patch."""
        at_BQ = patch_positions(batch.image_start_BM, self.image.patches)
        nowhere = jnp.zeros(batch.tokens_BL.shape, bool)
        return jax.vmap(lambda row, at: row.at[at].set(True, mode="drop"))(nowhere, at_BQ)

    def _embed_batch(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> tuple[BLD, Any]:
        """What enters the transformer, patch vectors where the images are, and what the patch
        encoder carries around it."""
        at_BQ = patch_positions(batch.image_start_BM, self.image.patches)
        vectors_BMPD, carried = self.patches.encode(noisy_BMhwc, t_BM)
        x_BLD = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))(
            self.embed(batch.tokens_BL), at_BQ, vectors_BMPD.reshape(*at_BQ.shape, -1)
        )
        return constrain(x_BLD, "batch", "residual", None), carried
