"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, equation 34), the half-split layout
of Llama."""

import jax.numpy as jnp
from jax import Array

from transfusion_jax.shapes import BL


def rotation(position_BL: BL, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine [B, L, 1, H / 2] of the angles position * theta^(-2i / H), in float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLNH: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of every head; computed in float32, returned in the
    input's dtype."""
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(
        x_BLNH.dtype
    )
