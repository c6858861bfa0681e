"""Losses of single examples: of a position, of an image."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.shapes import BL, BLD, BMhwc, FloatBL, FloatBM


class TokenLosses(NamedTuple):
    """Of every position."""

    cross_entropy_BL: FloatBL
    """Of the next token, in nats."""
    log_z_BL: FloatBL
    """Logarithm of the denominator of the softmax, whose square is the z-loss."""


def token_losses(
    hidden_BLD: BLD, target_BL: BL, logits: Callable[[Array], Array], chunk: int
) -> TokenLosses:
    """Next-token losses of every position.

    `logits` projects hidden states to the vocabulary. It is applied to `chunk` positions of each
    row at a time, and once more in the backward pass, so the [B, L, V] logits never exist. Of C
    chunks, chunk c is the positions c, c + C, c + 2C, ...: devices that each hold a part of a row
    (mesh axis `sequence`) have an equal share of every chunk.
    """
    B, L, D = hidden_BLD.shape
    chunk = min(chunk, L)
    chunks, pad = -(-L // chunk), -L % chunk

    @jax.checkpoint
    def loss(_, piece):
        hidden_BTD, target_BT = piece
        logits_BTV = logits(hidden_BTD)
        at_target_BT = jnp.take_along_axis(logits_BTV, target_BT[:, :, None], axis=-1)[:, :, 0]
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        return None, TokenLosses(log_z_BT - at_target_BT, log_z_BT)

    hidden = jnp.pad(hidden_BLD, ((0, 0), (0, pad), (0, 0))).reshape(B, chunk, chunks, D)
    target = jnp.pad(target_BL, ((0, 0), (0, pad))).reshape(B, chunk, chunks)
    _, losses = jax.lax.scan(loss, None, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(target, 2, 0)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, L + pad)[:, :L], losses)


def image_loss(predicted_BMhwc: BMhwc, target_BMhwc: BMhwc, weight_BM: Array) -> FloatBM:
    """Mean squared error of every image slot, over the image's elements, times a weight."""
    return weight_BM * jnp.mean(jnp.square(predicted_BMhwc - target_BMhwc), axis=(-3, -2, -1))
