"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) epsilon, t = 0 ... T - 1.

Both are tables over the training timesteps, computed in float64 and stored in float32. Step -1,
where samplers end, is the clean image: alpha = 1, sigma = 0.

A new schedule is one class with a `table`, and one entry of `SCHEDULES`.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """A schedule of `steps` training timesteps."""

    steps: int
    """T."""

    @abc.abstractmethod
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) of the timesteps -1 ... T - 1: two float64 arrays of T + 1 values."""

    def alpha(self, t: Array) -> Array:
        """Scale of the clean image at integer timesteps -1 <= t < T; any shape, float32."""
        return jnp.asarray(self.table()[0].astype(np.float32))[t + 1]

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise at integer timesteps -1 <= t < T; any shape, float32."""
        return jnp.asarray(self.table()[1].astype(np.float32))[t + 1]


class Cosine(Schedule):
    """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) (Nichol & Dhariwal 2021, equation 17).

    alpha_bar_t = f(t + 1) / f(0) with f(u) = cos^2((u / T + s) / (1 + s) * pi / 2) and s = 0.008,
    and beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} is at most 0.999.
    """

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)
        alpha_bar = np.cumprod(np.concatenate([[1.0], 1.0 - beta]))
        return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


class Flow(Schedule):
    """alpha = 1 - u, sigma = u with u = (t + 1) / T (rectified flow, Liu et al. 2022).

    The last timestep is pure noise: alpha(T - 1) = 0.
    """

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        return 1.0 - u, u


SCHEDULES: Mapping[str, type[Schedule]] = {"cosine": Cosine, "flow": Flow}
"""By the names of `diffusion.schedule`."""
