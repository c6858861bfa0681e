"""The objective: L = L_LM + lambda * L_DDPM (section 3.3). Losses are per example; `total` alone reduces them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.diffusion.process import Process
from transfusion_jax.model.transfusion import Transfusion
from transfusion_jax.shapes import BL, BLD, BM, BMhwc, FloatBL, FloatBM, Scalar


def text_loss(
    hidden_BLD: BLD, target_BL: BL, logits: Callable[[Array], Array], chunk: int
) -> FloatBL:
    """Next-token cross-entropy of every position, in nats.

    `logits` projects hidden states to the vocabulary; it is applied to `chunk` positions of each row at a
    time and again in the backward pass, so the [B, L, V] logits never exist. Of C chunks, chunk c is the positions
    c, c + C, c + 2C, ...: so devices that each hold a part of a row (mesh axis `sequence`) share every chunk.
    """
    B, L, D = hidden_BLD.shape
    chunk = min(chunk, L)
    chunks, pad = -(-L // chunk), -L % chunk

    @jax.checkpoint
    def loss(_, piece):
        hidden_BCD, target_BC = piece
        logits_BCV = logits(hidden_BCD)
        at_target_BC = jnp.take_along_axis(logits_BCV, target_BC[:, :, None], axis=-1)[:, :, 0]
        return None, jax.nn.logsumexp(logits_BCV, axis=-1) - at_target_BC

    hidden = jnp.pad(hidden_BLD, ((0, 0), (0, pad), (0, 0))).reshape(B, chunk, chunks, D)
    target = jnp.pad(target_BL, ((0, 0), (0, pad))).reshape(B, chunk, chunks)
    _, loss = jax.lax.scan(loss, None, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(target, 2, 0)))
    return jnp.moveaxis(loss, 0, 2).reshape(B, L + pad)[:, :L]


def image_loss(predicted_BMhwc: BMhwc, target_BMhwc: BMhwc) -> FloatBM:
    """Mean squared error of every image slot, over the image's elements."""
    return jnp.mean(jnp.square(predicted_BMhwc - target_BMhwc), axis=(-3, -2, -1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """`total` is minimised; `text` is a mean over text targets, `image` over images."""

    total: Scalar
    text: Scalar
    image: Scalar


def total(
    text_BL: FloatBL, image_BM: FloatBM, part: Batch, whole: Batch, image_weight: float
) -> Losses:
    """Sums of the losses of `part` over the weights of `whole`, the global batch that it is all or some rows of.

    So the losses of a batch are the sum of those of its parts. Without text targets, or images, that loss is 0.
    """

    def mean(loss, weight, all_weights):
        return jnp.sum(loss * weight) / jnp.maximum(jnp.sum(all_weights), 1.0)

    text = mean(text_BL, part.text_weight_BL, whole.text_weight_BL)
    image = mean(image_BM, part.image_weight_BM, whole.image_weight_BM)
    return Losses(text + image_weight * image, text, image)


def example_losses(
    model: Transfusion,
    process: Process,
    batch: Batch,
    t_BM: BM,
    noise_BMhwc: BMhwc,
    vocab_chunk: int,
) -> tuple[FloatBL, FloatBM]:
    """Text loss of every position and image loss of every slot, images corrupted by this noise to timestep t."""
    noisy_BMhwc = process.corrupt(batch.latents_BMhwc, noise_BMhwc, t_BM)
    hidden_BLD, predicted_BMhwc = model(batch, noisy_BMhwc, t_BM)
    target_BMhwc = process.target(batch.latents_BMhwc, noise_BMhwc, t_BM)
    text_BL = text_loss(hidden_BLD, batch.text_target_BL, model.head(), vocab_chunk)
    return text_BL, image_loss(predicted_BMhwc, target_BMhwc)
