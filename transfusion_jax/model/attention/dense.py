"""The reference: builds the whole mask and all the scores. Short rows, single steps of decoding,
and tests."""

import jax.numpy as jnp
from jax import Array

from transfusion_jax.model.attention.intervals import Intervals


def dense_attention(q_BLNH: Array, k_BSKH: Array, v_BSKH: Array, intervals: Intervals) -> Array:
    """Same contract as `attention`; memory grows with L * S."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    q = q_BLNH.reshape(B, L, K, N // K, H)
    scores = (
        jnp.einsum("blkgh,bskh->bkgls", q, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    )
    key = jnp.arange(S)[None, None, :]
    inside_BLS = (key >= intervals.k_start_BL[:, :, None]) & (key < intervals.k_end_BL[:, :, None])
    inside = inside_BLS[:, None, None]
    peak = jnp.max(scores, axis=-1, keepdims=True, where=inside, initial=-1e30)
    weights = jnp.where(inside, jnp.exp(jnp.where(inside, scores - peak, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "bkgls,bskh->blkgh",
        weights.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, L, N, H).astype(q_BLNH.dtype)
