"""Losses of single examples: of a position, of an image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.model.layers import float32_product
from transfusion_jax.parallel.gathers import holds_whole_rows
from transfusion_jax.shapes import BL, BLD, BMhwc, FloatBL, FloatBM


class TokenLosses(NamedTuple):
    """Of every position."""

    cross_entropy_BL: FloatBL
    """Of the next token, in nats."""
    log_z_BL: FloatBL
    """Logarithm of the denominator of the softmax, whose square is the z-loss."""


def token_losses(
    hidden_BLD: BLD, target_BL: BL, weight_BL: FloatBL, kernel_DV: Array, chunk: int
) -> TokenLosses:
    """Next-token losses of every position whose weight is not 0, and 0 elsewhere.

    The logits of `chunk` positions of each row exist at one time, computed once for the losses and
    once more for the gradients; those of all positions, [B, L, V], never do.

    Where a device holds its rows whole, in several chunks, positions with a weight come first, and
    chunks that have none are skipped: no logits for patches. Elsewhere all are computed, and of C
    chunks, chunk c is the positions c, c + C, c + 2C, ...: devices that each hold a part of a row
    (mesh axis `sequence`) have an equal share of every chunk.
    """
    B, L, _ = hidden_BLD.shape
    chunk = min(chunk, L)
    if holds_whole_rows() and chunk < L:
        count, size = B * L, B * chunk
        order_N = jnp.argsort(weight_BL.reshape(count) == 0, stable=True)
        used = -(-jnp.count_nonzero(weight_BL) // size)

        def cut(x_BL):
            flat = x_BL.reshape(count, *x_BL.shape[2:])[order_N]
            return _padded(flat, -count % size).reshape(-1, size, *flat.shape[1:])

        def joined(x_CT):
            flat = x_CT.reshape(-1)[:count]
            return jnp.zeros_like(flat).at[order_N].set(flat, unique_indices=True).reshape(B, L)

    else:
        used = None

        def cut(x_BL):
            padded = _padded(jnp.moveaxis(x_BL, 1, 0), -L % chunk)
            strided = padded.reshape(chunk, -1, *padded.shape[1:])
            return jnp.moveaxis(strided, (0, 1), (2, 0))

        def joined(x_CBT):
            return jnp.moveaxis(x_CBT, 0, 2).reshape(B, -1)[:, :L]

    losses = _losses_of_chunks(cut(hidden_BLD), cut(target_BL), kernel_DV, used)
    return jax.tree.map(lambda x: jnp.where(weight_BL == 0, 0.0, joined(x)), losses)


def _padded(x: Array, zeros: int) -> Array:
    return jnp.pad(x, ((0, zeros), *((0, 0) for _ in x.shape[1:])))


@jax.custom_vjp
def _losses_of_chunks(
    hidden: Array, target: Array, kernel_DV: Array, used: Array | None
) -> TokenLosses:
    """Of hidden states [C, ..., D] and targets [C, ...]; 0 behind the first `used` chunks."""

    def losses(hidden, target):
        logits = float32_product(hidden, kernel_DV)
        at_target = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return TokenLosses(log_z - at_target, log_z)

    def chunk(index, piece):
        nothing = jnp.zeros(target.shape[1:], jnp.float32)
        return index + 1, _if_used(index, used, losses, TokenLosses(nothing, nothing), *piece)

    return jax.lax.scan(chunk, 0, (hidden, target))[1]


def _losses_forward(hidden, target, kernel_DV, used):
    losses = _losses_of_chunks(hidden, target, kernel_DV, used)
    return losses, (hidden, target, kernel_DV, used, losses.log_z_BL)


def _losses_backward(saved, gradients):
    """With p the softmax of the logits z: d cross_entropy / dz = p - one_hot(target) and
    d log_z / dz = p. So a pass over the logits is all that is needed once `log_z` is known."""
    hidden, target, kernel_DV, used, log_z = saved

    def chunk(carried, piece):
        index, kernel_gradient = carried

        def gradients(hidden, target, log_z, of_cross_entropy, of_log_z):
            logits, pull = jax.vjp(float32_product, hidden, kernel_DV)
            p = jnp.exp(logits - log_z[..., None])
            at_target = jax.nn.one_hot(target, logits.shape[-1])
            of_logits = (of_cross_entropy + of_log_z)[..., None] * p
            of_hidden, of_kernel = pull(of_logits - of_cross_entropy[..., None] * at_target)
            return of_hidden, kernel_gradient + of_kernel

        nothing = jnp.zeros_like(piece[0]), kernel_gradient
        of_hidden, kernel_gradient = _if_used(index, used, gradients, nothing, *piece)
        return (index + 1, kernel_gradient), of_hidden

    (_, of_kernel), of_hidden = jax.lax.scan(
        chunk, (0, jnp.zeros_like(kernel_DV)), (hidden, target, log_z, *gradients)
    )
    return of_hidden, None, of_kernel, None


_losses_of_chunks.defvjp(_losses_forward, _losses_backward)


def _if_used(index, used, function, nothing, *arguments):
    """`function(*arguments)` of a chunk that is used, `nothing` of others; None: all are."""
    if used is None:
        return function(*arguments)
    return jax.lax.cond(index < used, function, lambda *_: nothing, *arguments)


def image_loss(predicted_BMhwc: BMhwc, target_BMhwc: BMhwc, weight_BM: Array) -> FloatBM:
    """Mean squared error of every image slot, over the image's elements, times a weight."""
    return weight_BM * jnp.mean(jnp.square(predicted_BMhwc - target_BMhwc), axis=(-3, -2, -1))
