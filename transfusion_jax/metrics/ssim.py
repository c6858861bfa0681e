"""Structural similarity (Wang et al. 2004)."""

import jax.numpy as jnp
import numpy as np
from jax import Array

RANGE = 2.0  # of values in [-1, 1]


def ssim(image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Structural similarity of every picture [B], its mean over places and channels.

    Wang et al. 2004, equation 13. Gaussian window of 11x11, sigma 1.5; K1 = 0.01, K2 = 0.03; only
    where the window lies inside the picture. For smaller pictures the window shrinks to the largest
    odd side that fits.
    """
    sides = image_Bhwc.shape[1:3]
    half = min(5, (min(sides) - 1) // 2)
    window = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * 1.5**2))
    window = jnp.asarray(window / window.sum(), jnp.float32)

    def blur(x: Array) -> Array:
        """The window's mean at every place, one axis after the other."""
        x = sum(w * x[:, i : i + sides[0] - 2 * half] for i, w in enumerate(window))
        return sum(w * x[:, :, i : i + sides[1] - 2 * half] for i, w in enumerate(window))

    x, y = image_Bhwc, jnp.clip(reconstruction_Bhwc, -1.0, 1.0)
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(
        luminance * (2 * covariance + c2) / (variance_x + variance_y + c2), axis=(1, 2, 3)
    )
