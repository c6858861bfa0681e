"""Vector quantisation: each latent becomes the nearest entry of a codebook.

Van den Oord et al. 2017, arXiv 1711.00937. Entries are called codes, and so are their indices. In
array names C counts chunks of the codebook, and K the codes of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

CHUNK = 2048
"""Codes per step of the search; distances to all codes at once would take [latents, codes]."""


class Quantized(NamedTuple):
    latent: Array
    """[B, h, w, z]: the nearest codes, with straight-through gradients to the latents."""
    codes: Array
    """[B, h, w], int32: their indices."""
    loss_B: Array
    """Codebook loss + commitment * commitment loss, averaged over an example's elements."""


class Quantizer(nnx.Module):
    """A codebook of `codes` vectors with `width` channels, trained by gradients."""

    def __init__(self, codes: int, width: int, *, rngs: nnx.Rngs):
        value = jax.random.uniform(
            rngs.params(), (codes, width), jnp.float32, -1 / codes, 1 / codes
        )
        self.codebook = nnx.Param(value, out_sharding=(None, None), eager_sharding=False)

    def __call__(self, latent_Bhwz: Array, commitment: float = 0.25) -> Quantized:
        """Quantises latents; the loss is |sg(z) - e|^2 + commitment |z - sg(e)|^2 (equation 3)."""
        sg = jax.lax.stop_gradient
        codes_Bhw = nearest(latent_Bhwz, self.codebook[...])
        code_Bhwz = self.lookup(codes_Bhw)
        codebook_Bhwz = (sg(latent_Bhwz) - code_Bhwz) ** 2
        commitment_Bhwz = (latent_Bhwz - sg(code_Bhwz)) ** 2
        return Quantized(
            latent=latent_Bhwz + sg(code_Bhwz - latent_Bhwz),
            codes=codes_Bhw,
            loss_B=jnp.mean(codebook_Bhwz + commitment * commitment_Bhwz, axis=(1, 2, 3)),
        )

    def lookup(self, codes: Array) -> Array:
        """Codebook entries [..., z] of indices [...]."""
        return self.codebook[...][codes]


def nearest(latent: Array, codebook: Array) -> Array:
    """Indices [...], int32, of the codes nearest to latents [..., z]; the lowest one in a tie."""
    latent, codebook = jax.lax.stop_gradient((latent, codebook))
    n, z = codebook.shape
    chunk = min(CHUNK, n)
    padding = -n % chunk
    squares = jnp.sum(codebook**2, axis=1)
    squares_CK = jnp.pad(squares, (0, padding), constant_values=jnp.inf).reshape(-1, chunk)
    codes_CKz = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, chunk, z)
    starts_C = jnp.arange(0, n, chunk, dtype=jnp.int32)

    def compare(best, codes):
        distance, index = best
        codes_Kz, squares_K, start = codes
        # |z - e|^2 less |z|^2, which is the same for all codes.
        product = jnp.einsum("...z,Kz->...K", latent, codes_Kz, precision=jax.lax.Precision.HIGHEST)
        distances = squares_K.reshape((1,) * (product.ndim - 1) + (-1,)) - 2.0 * product
        nearest_distance = jnp.min(distances, axis=-1)
        nearest_index = start + jnp.argmin(distances, axis=-1).astype(jnp.int32)
        index = jnp.where(nearest_distance < distance, nearest_index, index)
        return (jnp.minimum(distance, nearest_distance), index), None

    lead = latent.shape[:-1]
    none = (jnp.full(lead, jnp.inf, jnp.float32), jnp.zeros(lead, jnp.int32))
    (_, index), _ = jax.lax.scan(compare, none, (codes_CKz, squares_CK, starts_C))
    return index


class Usage(NamedTuple):
    """How much of a codebook a set of codes uses."""

    share: Array
    """Fraction of the n codes that occur at all."""
    perplexity: Array
    """exp(entropy of the frequencies of the codes): n if all occur equally often."""


def count(codes: Array, n: int) -> Array:
    """How often each of n codes occurs, [n], int32."""
    return jnp.bincount(codes.reshape(-1), length=n).astype(jnp.int32)


def usage(codes: Array, n: int) -> Usage:
    """Usage of a codebook of n entries by codes of any shape."""
    counts = count(codes, n).astype(jnp.float32)
    frequency = counts / jnp.sum(counts)
    entropy = jnp.sum(jax.scipy.special.entr(frequency))
    return Usage(jnp.mean((counts > 0).astype(jnp.float32)), jnp.exp(entropy))


def revive(codebook: Array, latents: Array, counts: Array, key: Array) -> Array:
    """The codebook [n, z] with each code of count 0 replaced by a random latent out of [..., z]."""
    candidates = latents.reshape(-1, latents.shape[-1])
    drawn = jax.random.randint(key, counts.shape, 0, candidates.shape[0])
    return jnp.where((counts == 0)[:, None], jax.lax.stop_gradient(candidates)[drawn], codebook)
