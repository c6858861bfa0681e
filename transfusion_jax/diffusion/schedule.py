"""Noise schedules: alpha(t) and sigma(t) of x_t = alpha(t) x_0 + sigma(t) epsilon, t = 0 ... T - 1.

Both are tables over the training timesteps, computed in float64 and stored in float32. Step -1,
where samplers end, is the clean image: alpha = 1, sigma = 0.

A new schedule is one class with a `curve`, and one entry of `SCHEDULES`.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """A schedule of `steps` training timesteps."""

    ORDER: ClassVar[int] = 2
    """alpha^ORDER + sigma^ORDER = 1: 2 preserves the variance, 1 is a straight line."""

    steps: int
    """T."""
    snr_scale: float = 1.0
    """Multiplies the signal-to-noise ratio (alpha / sigma)^2 of every timestep: the shifted
    schedule of Hoogeboom et al. (2023, arXiv 2301.11093, equation 6), where it is (64 / d)^2 for
    pictures of d x d."""

    @abc.abstractmethod
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) of the timesteps -1 ... T - 1, for `snr_scale` 1: two float64 arrays of
        T + 1 values."""

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """`curve` with its signal-to-noise ratios multiplied by `snr_scale`."""
        alpha, sigma = self.curve()
        if self.snr_scale == 1:
            return alpha, sigma
        sigma = sigma / np.sqrt(self.snr_scale)
        norm = (alpha**self.ORDER + sigma**self.ORDER) ** (1 / self.ORDER)
        return alpha / norm, sigma / norm

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

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return _of_betas(np.minimum(1.0 - f[1:] / f[:-1], 0.999))


class Linear(Schedule):
    """alpha^2 is the product of 1 - beta; beta rises linearly from 1e-4 to 0.02 (Ho et al. 2020,
    section 4).

    These are for T = 1,000; for another T they are multiplied by 1,000 / T (Nichol & Dhariwal
    2021), and beta is at most 0.999.
    """

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        beta = np.linspace(1e-4, 0.02, self.steps) * 1000 / self.steps
        return _of_betas(np.minimum(beta, 0.999))


class Flow(Schedule):
    """alpha = 1 - u, sigma = u with u = (t + 1) / T (rectified flow, Liu et al. 2022).

    The last timestep is pure noise: alpha(T - 1) = 0.
    """

    ORDER = 1

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        u = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        return 1.0 - u, u


def _of_betas(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) of a chain whose step t adds noise of variance beta_t."""
    alpha_bar = np.cumprod(np.concatenate([[1.0], 1.0 - beta]))
    return np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)


SCHEDULES: Mapping[str, type[Schedule]] = {"cosine": Cosine, "linear": Linear, "flow": Flow}
"""By the names of `diffusion.schedule`."""
