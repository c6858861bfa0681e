"""Samplers: from noise to an image along a subset of the training timesteps.

One step from timestep t to an earlier s, with the predicted (x_0, epsilon) at t (Song et al. 2021,
equation 12):

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) epsilon + c z,    z ~ N(0, I)
    c   = eta * sigma_s * sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)

DDIM is eta = 0: deterministic. Ancestral DDPM is eta = 1: c^2 is then the variance of the true
posterior q(x_s | x_t, x_0) (Ho et al. 2020, equation 7; the "small" variance). The paper does not
say which it used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.config import SamplerConfig
from transfusion_jax.diffusion.process import Process


def timesteps(training_steps: int, sampling_steps: int) -> np.ndarray:
    """`sampling_steps` + 1 timesteps, evenly spaced, from T - 1 down to -1, the clean image."""
    return np.round(np.linspace(training_steps - 1, -1, sampling_steps + 1)).astype(np.int32)


@dataclass(frozen=True)
class Sampler:
    process: Process
    steps: int
    eta: float
    """0: DDIM; 1: ancestral DDPM."""
    clip: float = 0.0
    """Clip the predicted x_0 to [-clip, clip], and recompute epsilon from it; 0: never. Near t = T,
    x_0 = (x_t - sigma epsilon) / alpha divides by almost nothing, and a clip well outside the data
    keeps the error of that step small."""

    def step(self, x_t: Array, predicted: Array, t: Array, s: Array, z: Array) -> Array:
        """x_s from x_t; `t` and `s` are scalars, `z` is standard normal."""
        schedule = self.process.schedule
        alpha_t = schedule.alpha(t)
        sigma_t = schedule.sigma(t)
        alpha_s = schedule.alpha(s)
        sigma_s = schedule.sigma(s)
        clean, noise = self.process.split(x_t, predicted, t)
        if self.clip:
            clean = jnp.clip(clean, -self.clip, self.clip)
            noise = (x_t - alpha_t * clean) / sigma_t
        ratio = alpha_t * sigma_s / (alpha_s * sigma_t)
        c = self.eta * sigma_s * jnp.sqrt(jnp.maximum(1.0 - ratio**2, 0.0))
        return alpha_s * clean + jnp.sqrt(jnp.maximum(sigma_s**2 - c**2, 0.0)) * noise + c * z

    def sample(
        self,
        start: Array,
        predict: Callable[[Array, Array], Array],
        fresh_noise: Callable[[Array], Array],
    ) -> Array:
        """All steps from `start`, standard normal noise of any shape; usable inside jit.

        `predict(x_t, t)` is the network, with a scalar t; `fresh_noise(i)` is the standard normal z
        of step i.
        """
        path = jnp.asarray(timesteps(self.process.schedule.steps, self.steps))

        def body(i, x_t):
            return self.step(x_t, predict(x_t, path[i]), path[i], path[i + 1], fresh_noise(i))

        return jax.lax.fori_loop(0, self.steps, body, start)


def sampler(config: SamplerConfig, process: Process) -> Sampler:
    return Sampler(process, config.steps, {"ddim": 0.0, "ddpm": 1.0}[config.kind], config.clip)
