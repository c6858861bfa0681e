"""The diffusion process: x_t = alpha(t) x_0 + sigma(t) epsilon, and what is predicted from it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.config import DiffusionConfig
from transfusion_jax.diffusion.prediction import PREDICTIONS, Prediction
from transfusion_jax.diffusion.schedule import SCHEDULES, Schedule
from transfusion_jax.shapes import BM, BMhwc

LEAST = 0.05
"""alpha and sigma are at least this where loss weights divide by them (Li & He 2025, arXiv
2511.13720, for sigma)."""


@dataclass(frozen=True)
class Process:
    """A schedule and a prediction. In all methods `t` has the leading dimensions of the images."""

    schedule: Schedule
    prediction: Prediction
    loss: str = "prediction"
    """As `diffusion.loss`."""
    min_snr_gamma: float = 5.0
    """As `diffusion.min_snr_gamma`."""

    def corrupt(self, clean: Array, noise: Array, t: Array) -> Array:
        """x_t."""
        alpha, sigma = self._coefficients(t, clean.ndim)
        return alpha * clean + sigma * noise

    def unnoticed(self, clean: Array, t: Array) -> Array:
        """The noise of which x_t is the clean image itself, to rounding."""
        alpha, sigma = self._coefficients(t, clean.ndim)
        return (1 - alpha) / sigma * clean

    def target(self, clean: Array, noise: Array, t: Array) -> Array:
        """What the network should predict from x_t."""
        return self.prediction.target(clean, noise, *self._coefficients(t, clean.ndim))

    def split(self, x_t: Array, predicted: Array, t: Array) -> tuple[Array, Array]:
        """(x_0, epsilon) of a prediction."""
        return self.prediction.split(x_t, predicted, *self._coefficients(t, x_t.ndim))

    def loss_weight(self, t: Array) -> Array:
        """What the squared error of a prediction is multiplied with, in float32, any shape."""
        if self.loss == "prediction":
            return jnp.ones(t.shape, jnp.float32)
        alpha, sigma = (np.maximum(x[1:], LEAST) for x in self.schedule.table())
        if self.loss == "min_snr":
            of_clean = np.minimum((alpha / sigma) ** 2, self.min_snr_gamma)
        else:
            of_clean = PREDICTIONS[self.loss].gain(alpha, sigma) ** 2
        weight = of_clean / self.prediction.gain(alpha, sigma) ** 2
        return jnp.asarray(weight.astype(np.float32))[t]

    def _coefficients(self, t: Array, rank: int) -> tuple[Array, Array]:
        shape = t.shape + (1,) * (rank - t.ndim)
        return self.schedule.alpha(t).reshape(shape), self.schedule.sigma(t).reshape(shape)


def process(config: DiffusionConfig) -> Process:
    """The process of these names."""
    return Process(
        SCHEDULES[config.schedule](config.steps, config.snr_scale),
        PREDICTIONS[config.prediction],
        config.loss,
        config.min_snr_gamma,
    )


class Noise(NamedTuple):
    """A timestep and standard normal noise for every image slot."""

    t_BM: BM
    noise_BMhwc: BMhwc


def draw_training_noise(
    key: Array, limit_BM: BM, latents_BMhwc: BMhwc, config: DiffusionConfig | None = None
) -> Noise:
    """Timesteps in [0, limit), drawn as `config.timesteps` says (uniformly without a config), and
    noise of the latents' shape.

    Row b's draws depend on (key, b) alone, so splitting the batch over devices does not change
    them.
    """

    def row(b, limit_M, latents_Mhwc):
        t_key, noise_key = jax.random.split(jax.random.fold_in(key, b))
        t_M = _timesteps(t_key, limit_M, config)
        return t_M, jax.random.normal(noise_key, latents_Mhwc.shape, jnp.float32)

    return Noise(*jax.vmap(row)(jnp.arange(limit_BM.shape[0]), limit_BM, latents_BMhwc))


def _timesteps(key: Array, limit: Array, config: DiffusionConfig | None) -> Array:
    """One for each limit."""
    if config is None or config.timesteps == "uniform":
        return jax.random.randint(key, limit.shape, 0, limit)
    normal = jax.random.normal(key, limit.shape, jnp.float32)
    share = jax.nn.sigmoid(config.timestep_mean + config.timestep_std * normal)
    t = (share * limit.astype(jnp.float32)).astype(limit.dtype)
    return jnp.minimum(t, limit - 1)  # the share may have been rounded to 1
