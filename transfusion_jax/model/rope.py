"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, equation 34), the half-split layout
of Llama."""

import math

import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import RopeScaling
from transfusion_jax.shapes import BL


def rotation(
    position_BL: BL, head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[Array, Array]:
    """Cosine and sine [B, L, 1, H / 2] of the angles position * theta^(-2i / H), in float32, their
    frequencies scaled."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequency = scaled(frequency, scaling)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def scaled(frequency: Array, scaling: RopeScaling) -> Array:
    """Frequencies, in radians a position, after scaling."""
    if scaling.kind == "none":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def rotate(x_BLNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of every head; computed in float32, returned in the
    input's dtype.

    Split before they become float32, and joined after: XLA keeps what is used twice in memory, and
    this is half the size.
    """
    first, second = (half.astype(jnp.float32) for half in jnp.split(x_BLNH, 2, axis=-1))
    rotated = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate([half.astype(x_BLNH.dtype) for half in rotated], -1)
