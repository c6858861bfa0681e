"""Interval attention in blocks: online softmax, memory linear in L, in plain XLA.

The forward pass walks over blocks of queries and, for each, over the blocks of keys that lie
between the least `k_start` and the greatest `k_end` of the block (taken over the batch), so blocks
outside every interval are never computed. It keeps the log-sum-exp of each query; the backward pass
recomputes the probabilities from it, block by block (Dao et al. 2022, "FlashAttention", algorithms
1 and 4). Accumulation is in float32.

Inside this file queries are [C, B, K, R, H]: C blocks, and R = G * block rows, the G query heads
that share a key head laid one after the other, so every product is a plain batched matrix product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import kept

MASKED = -1e30  # a finite stand-in: -inf minus -inf is NaN


def chunked_attention(
    q_BLNH: Array, k_BSKH: Array, v_BSKH: Array, intervals: Intervals, *, block: int
) -> Array:
    """Same contract as `attention`; `block` is the number of queries, and of keys, in one block."""
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    G, block_q, block_k = N // K, min(block, L), min(block, S)
    C, pad_q, pad_k = -(-L // block_q), -L % block_q, -S % block_k

    q = jnp.pad(q_BLNH, ((0, 0), (0, pad_q), (0, 0), (0, 0)))
    q = (
        q.reshape(B, C, block_q, K, G, H)
        .transpose(1, 0, 3, 4, 2, 5)
        .reshape(C, B, K, G * block_q, H)
    )
    k, v = (
        jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x in (k_BSKH, v_BSKH)
    )
    # Padding queries get an empty interval.
    bounds = (jnp.pad(x, ((0, 0), (0, pad_q))) for x in (intervals.k_start_BL, intervals.k_end_BL))
    k_start, k_end = (
        jnp.tile(x.reshape(B, C, block_q).transpose(1, 0, 2), (1, 1, G)) for x in bounds
    )

    out = _blocked(q, k, v, k_start, k_end, block_k)
    out = (
        out.reshape(C, B, K, G, block_q, H)
        .transpose(1, 0, 4, 2, 3, 5)
        .reshape(B, C * block_q, N, H)
    )
    return out[:, :L]


def _visible_blocks(k_start: Array, k_end: Array, block_k: int) -> tuple[Array, Array]:
    """First, and one past the last, block of keys that some query of this block may see."""
    empty = k_end <= k_start
    first = jnp.min(jnp.where(empty, jnp.iinfo(k_start.dtype).max, k_start)) // block_k
    last = (jnp.max(jnp.where(empty, 0, k_end)) + block_k - 1) // block_k
    return first, last


def _block(x: Array, j: Array, size: int) -> Array:
    """Block j of keys, values or their gradients: [B, K, size, H]."""
    return lax.dynamic_slice_in_dim(x, j * size, size, axis=2)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k_j: Array, j: Array, k_start: Array, k_end: Array) -> Array:
    """Scaled scores [B, K, R, S] of one pair of blocks in float32, MASKED outside the intervals."""
    position = (j * k_j.shape[2] + jnp.arange(k_j.shape[2]))[None, None, :]
    inside = (position >= k_start[:, :, None]) & (position < k_end[:, :, None])
    return jnp.where(
        inside[:, None], _dot("bkrh,bksh->bkrs", q, k_j) * (q.shape[-1] ** -0.5), MASKED
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(q: Array, k: Array, v: Array, k_start: Array, k_end: Array, block_k: int) -> Array:
    return _forward(q, k, v, k_start, k_end, block_k)[0]


def _forward(q, k, v, k_start, k_end, block_k):
    def query_block(args):
        q, k_start, k_end = args

        def step(j, carry):
            peak, total, acc = carry
            s = _scores(q, _block(k, j, block_k), j, k_start, k_end)
            # At least MASKED / 2, so that masked scores vanish even in a row without a visible key
            # so far.
            new_peak = jnp.maximum(peak, s.max(-1))
            p = jnp.exp(s - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            acc = acc * decay[..., None] + _dot(
                "bkrs,bksh->bkrh", p.astype(v.dtype), _block(v, j, block_k)
            )
            return new_peak, total * decay + p.sum(-1), acc

        rows = q.shape[:-1]
        init = jnp.full(rows, MASKED / 2), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32)
        peak, total, acc = lax.fori_loop(*_visible_blocks(k_start, k_end, block_k), step, init)
        total = jnp.where(total > 0, total, 1.0)
        return (acc / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, logsumexp = kept(*lax.map(query_block, (q, k_start, k_end)))
    return out, (q, k, v, k_start, k_end, out, logsumexp)


def _backward(block_k, residuals, d_out):
    q, k, v, k_start, k_end, out, logsumexp = residuals
    scale = q.shape[-1] ** -0.5

    def query_block(carry, args):
        q, k_start, k_end, out, logsumexp, d_out = args
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

        def step(j, carry):
            dq, dk, dv = carry
            k_j, v_j = _block(k, j, block_k), _block(v, j, block_k)
            p = jnp.exp(_scores(q, k_j, j, k_start, k_end) - logsumexp[..., None])
            ds = p * (_dot("bkrh,bksh->bkrs", d_out, v_j) - delta[..., None]) * scale
            p, ds = p.astype(v.dtype), ds.astype(q.dtype)
            dk_j = _block(dk, j, block_k) + _dot("bkrs,bkrh->bksh", ds, q)
            dv_j = _block(dv, j, block_k) + _dot("bkrs,bkrh->bksh", p, d_out)
            dk, dv = (
                lax.dynamic_update_slice_in_dim(x, x_j, j * block_k, 2)
                for x, x_j in ((dk, dk_j), (dv, dv_j))
            )
            return dq + _dot("bkrs,bksh->bkrh", ds, k_j), dk, dv

        init = (jnp.zeros(q.shape, jnp.float32), *carry)
        dq, dk, dv = lax.fori_loop(*_visible_blocks(k_start, k_end, block_k), step, init)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = lax.scan(query_block, zeros, (q, k_start, k_end, out, logsumexp, d_out))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_blocked.defvjp(_forward, _backward)
