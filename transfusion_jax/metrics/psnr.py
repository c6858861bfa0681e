"""Peak signal-to-noise ratio."""

import jax.numpy as jnp
from jax import Array

RANGE = 2.0  # of values in [-1, 1]


def psnr(image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Peak signal-to-noise ratio of every picture [B], in dB, clipped to [-1, 1]; at most 100."""
    error = image_Bhwc - jnp.clip(reconstruction_Bhwc, -1.0, 1.0)
    return 10.0 * jnp.log10(
        RANGE**2 / jnp.maximum(jnp.mean(error * error, axis=(1, 2, 3)), RANGE**2 * 1e-10)
    )
