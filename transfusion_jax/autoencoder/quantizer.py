"""Vector quantisation (van den Oord et al. 2017, arXiv 1711.00937): each latent becomes the nearest code of a book."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

CHUNK = 2048  # codes that all latents are compared with at a time, so that [latents, codes] need not exist


class Quantized(NamedTuple):
    latent: Array
    """[B, h, w, z]: the codes' vectors; gradients pass to the latents as if nothing had been done to them."""
    codes: Array
    """[B, h, w], int32."""
    loss_B: Array
    """Codebook loss + commitment * commitment loss, the mean over an example's elements."""


class Quantizer(nnx.Module):
    """A codebook of `codes` vectors with `width` channels, trained by gradients."""

    def __init__(self, codes: int, width: int, *, rngs: nnx.Rngs):
        value = jax.random.uniform(
            rngs.params(), (codes, width), jnp.float32, -1 / codes, 1 / codes
        )
        self.codebook = nnx.Param(value, out_sharding=(None, None), eager_sharding=False)

    def __call__(self, latent_Bhwz: Array, commitment: float = 0.25) -> Quantized:
        """Quantises latents, with the loss of equation 3: |sg(z) - e|^2 + commitment |z - sg(e)|^2."""
        codes_Bhw = nearest(latent_Bhwz, self.codebook[...])
        code_Bhwz = self.lookup(codes_Bhw)
        fixed = jax.lax.stop_gradient
        squares_Bhwz = (fixed(latent_Bhwz) - code_Bhwz) ** 2 + commitment * (
            latent_Bhwz - fixed(code_Bhwz)
        ) ** 2
        straight_Bhwz = latent_Bhwz + fixed(code_Bhwz - latent_Bhwz)
        return Quantized(straight_Bhwz, codes_Bhw, jnp.mean(squares_Bhwz, axis=(1, 2, 3)))

    def lookup(self, codes: Array) -> Array:
        """Vectors [..., z] of codes [...]."""
        return self.codebook[...][codes]


def nearest(latent: Array, codebook: Array) -> Array:
    """Indices [...], int32, of the codes nearest to latents [..., z]; of equal ones the first."""
    latent, codebook = jax.lax.stop_gradient((latent, codebook))
    n, z = codebook.shape
    chunk = min(CHUNK, n)
    fill = -n % chunk
    codes_CKz = jnp.pad(codebook, ((0, fill), (0, 0))).reshape(-1, chunk, z)
    # |z - e|^2 without |z|^2, which all codes share.
    squares_CK = jnp.pad(jnp.sum(codebook**2, axis=1), (0, fill), constant_values=jnp.inf).reshape(
        -1, chunk
    )

    def compare(best, piece):
        distance, index = best
        codes_Kz, squares_K, start = piece
        product = jnp.einsum("...z,Kz->...K", latent, codes_Kz, precision=jax.lax.Precision.HIGHEST)
        distances = squares_K.reshape((1,) * (product.ndim - 1) + (-1,)) - 2.0 * product
        least = jnp.min(distances, axis=-1)
        here = start + jnp.argmin(distances, axis=-1).astype(jnp.int32)
        return (jnp.minimum(distance, least), jnp.where(least < distance, here, index)), None

    lead = latent.shape[:-1]
    first = (jnp.full(lead, jnp.inf, jnp.float32), jnp.zeros(lead, jnp.int32))
    starts = jnp.arange(0, n, chunk, dtype=jnp.int32)
    (_, index), _ = jax.lax.scan(compare, first, (codes_CKz, squares_CK, starts))
    return index


class Usage(NamedTuple):
    share: Array
    """Of the codes, those that occur."""
    perplexity: Array
    """exp of the entropy of the codes' frequencies: n where all occur equally often."""


def count(codes: Array, n: int) -> Array:
    """How often each of n codes occurs, [n], int32."""
    return jnp.bincount(codes.reshape(-1), length=n).astype(jnp.int32)


def usage(codes: Array, n: int) -> Usage:
    """How much of a book of n codes these ones use."""
    counts = count(codes, n).astype(jnp.float32)
    frequency = counts / jnp.sum(counts)
    entropy = jnp.sum(jax.scipy.special.entr(frequency))
    return Usage(jnp.mean((counts > 0).astype(jnp.float32)), jnp.exp(entropy))


def revive(codebook: Array, latents: Array, counts: Array, key: Array) -> Array:
    """The codebook [n, z] with every code of count 0 moved to a random one of the latents [..., z]."""
    candidates = latents.reshape(-1, latents.shape[-1])
    drawn = jax.random.randint(key, counts.shape, 0, candidates.shape[0])
    return jnp.where((counts == 0)[:, None], jax.lax.stop_gradient(candidates)[drawn], codebook)
