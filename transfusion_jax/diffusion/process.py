"""The diffusion process: corruption, what the network predicts, and the way back to image and noise.

With x_t = alpha x_0 + sigma epsilon, the network predicts one of

    epsilon                                      (Ho et al. 2020, equation 14)
    v    = alpha epsilon - sigma x_0             (Salimans & Ho 2022, appendix D; needs alpha^2 + sigma^2 = 1)
    flow = epsilon - x_0                         (Liu et al. 2022; needs alpha + sigma = 1)

and each gives back x_0 and epsilon:

    epsilon:  x_0 = (x_t - sigma epsilon) / alpha
    v:        x_0 = alpha x_t - sigma v,         epsilon = sigma x_t + alpha v
    flow:     x_0 = x_t - sigma flow,            epsilon = x_t + alpha flow
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import DiffusionConfig
from transfusion_jax.diffusion.schedule import Schedule
from transfusion_jax.shapes import BM, BMhwc


@dataclass(frozen=True)
class Process:
    """A schedule and the quantity that the network predicts."""

    schedule: Schedule
    prediction: Literal["epsilon", "v", "flow"]

    def corrupt(self, clean: Array, noise: Array, t: Array) -> Array:
        """x_t; `t` has the leading dimensions of `clean`."""
        alpha, sigma = self._coefficients(t, clean.ndim)
        return alpha * clean + sigma * noise

    def target(self, clean: Array, noise: Array, t: Array) -> Array:
        """What the network should predict from x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - clean
        alpha, sigma = self._coefficients(t, clean.ndim)
        return alpha * noise - sigma * clean

    def split(self, x_t: Array, predicted: Array, t: Array) -> tuple[Array, Array]:
        """(x_0, epsilon) that a prediction stands for."""
        alpha, sigma = self._coefficients(t, x_t.ndim)
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / alpha, predicted
        if self.prediction == "flow":
            return x_t - sigma * predicted, x_t + alpha * predicted
        return alpha * x_t - sigma * predicted, sigma * x_t + alpha * predicted

    def _coefficients(self, t: Array, rank: int) -> tuple[Array, Array]:
        shape = t.shape + (1,) * (rank - t.ndim)
        return self.schedule.alpha(t).reshape(shape), self.schedule.sigma(t).reshape(shape)


def process(config: DiffusionConfig) -> Process:
    return Process(Schedule(config.schedule, config.steps), config.prediction)


def draw_training_noise(key: Array, limit_BM: BM, latents_BMhwc: BMhwc) -> tuple[Array, Array]:
    """Timesteps, uniform in [0, limit), and standard normal noise for every image slot.

    Row b's draws depend on (key, b) alone, so they are the same however the batch is split over devices.
    """

    def row(b, limit_M, latents_Mhwc):
        t_key, noise_key = jax.random.split(jax.random.fold_in(key, b))
        t_M = jax.random.randint(t_key, limit_M.shape, 0, limit_M)
        return t_M, jax.random.normal(noise_key, latents_Mhwc.shape, jnp.float32)

    return jax.vmap(row)(jnp.arange(limit_BM.shape[0]), limit_BM, latents_BMhwc)
