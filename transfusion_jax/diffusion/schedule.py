"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) epsilon, for t = 0 ... T - 1.

Both are tables over the training timesteps, made in float64 and stored in float32. Step -1 is the clean image:
alpha = 1, sigma = 0; samplers end there.

cosine  alpha_bar_t = f(t + 1) / f(0),  f(u) = cos^2((u / T + s) / (1 + s) * pi / 2),  s = 0.008, with
        beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} at most 0.999 (Nichol & Dhariwal 2021, equation 17);
        alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar).
flow    alpha = 1 - u, sigma = u,  u = (t + 1) / T (rectified flow, Liu et al. 2022).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Schedule:
    """A named schedule of `steps` timesteps."""

    name: str
    steps: int

    def alpha(self, t: Array) -> Array:
        """Scale of the clean image at integer timesteps -1 <= t < T; any shape, float32."""
        return jnp.asarray(self._tables()[0])[t + 1]

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise at integer timesteps -1 <= t < T; any shape, float32."""
        return jnp.asarray(self._tables()[1])[t + 1]

    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        if self.name == "flow":
            alpha, sigma = 1.0 - u, u
        elif self.name == "cosine":
            f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
            beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
            alpha_bar = np.cumprod(np.concatenate([[1.0], 1.0 - beta]))
            alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)
        else:
            raise ValueError(f"schedule {self.name!r} is not one of 'cosine', 'flow'")
        return alpha.astype(np.float32), sigma.astype(np.float32)
