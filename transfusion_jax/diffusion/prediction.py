"""What the network predicts from x_t = alpha x_0 + sigma epsilon, and x_0 and epsilon from that.

    epsilon                            (Ho et al. 2020, equation 14)
    x_0                                (Salimans & Ho 2022; for raw pixels: Li & He 2025)
    v = alpha epsilon - sigma x_0      (Salimans & Ho 2022, appendix D)
    u = epsilon - x_0                  (Liu et al. 2022)

The definition of x_t and that of the prediction are two linear equations in x_0 and epsilon. Their
solutions below assume neither alpha^2 + sigma^2 = 1 nor alpha + sigma = 1, so every prediction goes
with every schedule.

At a given x_t, an error e of x_0 is an error of -(alpha / sigma) e of epsilon, and so on: squared
errors of two predictions differ by a factor that depends on the timestep alone, the ratio of their
`gain`.

A new prediction is one class, and one entry of `PREDICTIONS`.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


class Prediction(abc.ABC):
    """Arrays of images have one shape; `alpha` and `sigma` broadcast against them."""

    @abc.abstractmethod
    def target(self, clean: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        """What the network should predict."""

    @abc.abstractmethod
    def split(
        self, x_t: Array, predicted: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        """(x_0, epsilon) of a prediction."""

    @abc.abstractmethod
    def gain(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """The size of the prediction's error for an error of 1 of x_0, x_t being given."""


@dataclass(frozen=True)
class Clean(Prediction):
    """x_0 itself; epsilon = (x_t - alpha x_0) / sigma."""

    def target(self, clean: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return clean

    def split(
        self, x_t: Array, predicted: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        return predicted, (x_t - alpha * predicted) / sigma

    def gain(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return np.ones_like(alpha)


@dataclass(frozen=True)
class Epsilon(Prediction):
    """x_0 = (x_t - sigma epsilon) / alpha.

    Where alpha is 0, x_t is epsilon and says nothing of x_0, which is then taken to be 0: images
    are centred, so that is their mean.
    """

    def target(self, clean: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return noise

    def split(
        self, x_t: Array, predicted: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        known = alpha > 0
        clean = (x_t - sigma * predicted) / jnp.where(known, alpha, 1.0)
        return jnp.where(known, clean, 0.0), predicted

    def gain(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return alpha / sigma


@dataclass(frozen=True)
class V(Prediction):
    """x_0 = (alpha x_t - sigma v) / n, epsilon = (sigma x_t + alpha v) / n, n = alpha^2 +
    sigma^2."""

    def target(self, clean: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return alpha * noise - sigma * clean

    def split(
        self, x_t: Array, predicted: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        n = alpha**2 + sigma**2
        return (alpha * x_t - sigma * predicted) / n, (sigma * x_t + alpha * predicted) / n

    def gain(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return (alpha**2 + sigma**2) / sigma


@dataclass(frozen=True)
class Velocity(Prediction):
    """x_0 = (x_t - sigma u) / n, epsilon = (x_t + alpha u) / n, n = alpha + sigma."""

    def target(self, clean: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return noise - clean

    def split(
        self, x_t: Array, predicted: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        n = alpha + sigma
        return (x_t - sigma * predicted) / n, (x_t + alpha * predicted) / n

    def gain(self, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return (alpha + sigma) / sigma


PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": Epsilon(),
    "v": V(),
    "flow": Velocity(),
    "x": Clean(),
}
"""By the names of `diffusion.prediction`."""
