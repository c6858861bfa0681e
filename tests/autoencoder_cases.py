"""Small autoencoders with random parameters, and images, for tests."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.autoencoder.vae import abstract_autoencoder

SMALL = AutoencoderConfig(
    size=16, latent_channels=4, width=8, multipliers=(1, 2), groups=4, blocks=1, codes=32
)
VQ = dataclasses.replace(SMALL, kind="vq")


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.cache
def parameters(config: AutoencoderConfig, seed: int = 0) -> dict:
    """Random parameters, drawn with NumPy because JAX would compile a draw for every shape."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    _, abstract = abstract_autoencoder(config)
    return jax.tree.map(draw, nnx.to_pure_dict(abstract))


def run(config: AutoencoderConfig, method, *arrays):
    """`method(model, *arrays)` of the autoencoder with `parameters(config)`, compiled."""
    graph, _ = abstract_autoencoder(config)

    @jax.jit
    def compiled(p, *arrays):
        return method(nnx.merge(graph, p), *arrays)

    return compiled(parameters(config), *arrays)
