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


def text_loss(hidden_BLD: BLD, target_BL: BL, logits: Callable[[Array], Array], chunk: int) -> FloatBL:
    """Next-token cross-entropy of every position, in nats.

    `logits` projects hidden states to the vocabulary; it is applied to `chunk` positions of each row at a
    time and again in the backward pass, so the [B, L, V] logits never exist.
    """
    B, L, D = hidden_BLD.shape
    chunk = min(chunk, L)
    pad = -L % chunk

    @jax.checkpoint
    def loss(_, piece):
        hidden_BCD, target_BC = piece
        logits_BCV = logits(hidden_BCD)
        at_target_BC = jnp.take_along_axis(logits_BCV, target_BC[:, :, None], axis=-1)[:, :, 0]
        return None, jax.nn.logsumexp(logits_BCV, axis=-1) - at_target_BC

    hidden = jnp.pad(hidden_BLD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, chunk, D).swapaxes(0, 1)
    target = jnp.pad(target_BL, ((0, 0), (0, pad))).reshape(B, -1, chunk).swapaxes(0, 1)
    _, loss_CBc = jax.lax.scan(loss, None, (hidden, target))
    return loss_CBc.swapaxes(0, 1).reshape(B, L + pad)[:, :L]


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


def total(text_BL: FloatBL, image_BM: FloatBM, batch: Batch, image_weight: float) -> Losses:
    """Weighted means over the global batch; a batch without text targets, or images, has that loss 0."""

    def mean(loss, weight):
        return jnp.sum(loss * weight) / jnp.maximum(jnp.sum(weight), 1.0)

    text, image = mean(text_BL, batch.text_weight_BL), mean(image_BM, batch.image_weight_BM)
    return Losses(text + image_weight * image, text, image)


def example_losses(
    model: Transfusion, process: Process, batch: Batch, t_BM: BM, noise_BMhwc: BMhwc, vocab_chunk: int
) -> tuple[FloatBL, FloatBM]:
    """Text loss of every position and image loss of every slot, images corrupted by this noise to timestep t."""
    noisy_BMhwc = process.corrupt(batch.latents_BMhwc, noise_BMhwc, t_BM)
    hidden_BLD, predicted_BMhwc = model(batch, noisy_BMhwc, t_BM)
    target_BMhwc = process.target(batch.latents_BMhwc, noise_BMhwc, t_BM)
    text_BL = text_loss(hidden_BLD, batch.text_target_BL, model.logits, vocab_chunk)
    return text_BL, image_loss(predicted_BMhwc, target_BMhwc)
