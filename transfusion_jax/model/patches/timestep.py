"""Timesteps as vectors."""

import jax.numpy as jnp
from jax import Array

WIDTH = 256
"""Of the sinusoid that a patch encoder's timestep layers start from."""
FASTEST = 0.1
"""Radians per timestep of the highest frequency: neighbouring timesteps have similar vectors."""


def sinusoid(t_BM: Array, width: int = WIDTH) -> Array:
    """[cos(t f), sin(t f)], shape [B, M, width], in float32.

    The frequencies f_i = FASTEST * 10,000^(-i / (width / 2)) are those of Vaswani et al. 2017,
    scaled.
    """
    half = width // 2
    frequency = FASTEST * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t_BM[..., None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
