"""Interval attention in blocks: online softmax, memory linear in L, in plain XLA.

The forward pass walks over blocks of queries and, for each, over the blocks of keys that lie
between the least `k_start` and the greatest `k_end` of the block, so blocks outside every interval
are never computed. It keeps the log-sum-exp of each query; the backward pass recomputes the
probabilities from it, block by block (Dao et al. 2022, "FlashAttention", algorithms 1 and 4).
Accumulation is in float32.

Rows of several blocks are taken a few at a time (`rows_together`), as those taken together walk
over the blocks that any of them needs. On a CPU a product of [R, H] and [H, S] is faster than one
of [R, H] and [S, H], and one that sums over the first axis of both factors takes twice the time of
the others; hence the turned copies, and gradients of keys and values that are summed as [H, S].

Inside this file queries are [A, C, B, K, R, H]: A groups of B rows, C blocks, and R = G * block
rows of a product, the G query heads that share a key head laid one after the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import kept

MASKED = -1e30  # a finite stand-in: -inf minus -inf is NaN
SCORES = 2**17  # of a pair of blocks, over heads and rows: enough for products to be fast


def rows_together(rows: int, length: int, heads: int, block: int) -> int:
    """How many rows of a device are taken together: all if a row is one block, else a divisor of
    their number."""
    most = rows if block >= length else min(max(SCORES // (heads * block**2), 1), rows)
    return max(n for n in range(1, most + 1) if rows % n == 0)


def chunked_attention(
    q_BLNH: Array, k_BSKH: Array, v_BSKH: Array, intervals: Intervals, *, block: int
) -> Array:
    """Same contract as `attention`; `block` is the number of queries, and of keys, in one block."""
    rows, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    G, block_q, block_k = N // K, min(block, L), min(block, S)
    # Where the number of rows is a symbol (`jax.export`), all are taken together.
    B = rows_together(rows, L, N, block) if isinstance(rows, int) else rows
    A, C, pad_q, pad_k = rows // B, -(-L // block_q), -L % block_q, -S % block_k

    q = jnp.pad(q_BLNH, ((0, 0), (0, pad_q), (0, 0), (0, 0)))
    q = (
        q.reshape(A, B, C, block_q, K, G, H)
        .transpose(0, 2, 1, 4, 5, 3, 6)
        .reshape(A, C, B, K, G * block_q, H)
    )
    k, v = (
        jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0)))
        .transpose(0, 2, 1, 3)
        .reshape(A, B, K, S + pad_k, H)
        for x in (k_BSKH, v_BSKH)
    )
    # Padding queries get an empty interval, and padding keys are in none.
    bounds = (
        jnp.pad(x.clip(0, S), ((0, 0), (0, pad_q)))
        for x in (intervals.k_start_BL, intervals.k_end_BL)
    )
    k_start, k_end = (
        jnp.tile(x.reshape(A, B, C, block_q).transpose(0, 2, 1, 3), (1, 1, 1, G)) for x in bounds
    )

    out = _blocked(q, k, v, k_start, k_end, block_k)
    out = (
        out.reshape(A, C, B, K, G, block_q, H)
        .transpose(0, 2, 1, 5, 3, 4, 6)
        .reshape(A * B, C * block_q, N, H)
    )
    return out[:, :L]


def _visible_blocks(k_start: Array, k_end: Array, block_k: int) -> tuple[Array, Array]:
    """First, and one past the last, block of keys that some query of this block may see."""
    empty = k_end <= k_start
    first = jnp.min(jnp.where(empty, jnp.iinfo(k_start.dtype).max, k_start)) // block_k
    last = (jnp.max(jnp.where(empty, 0, k_end)) + block_k - 1) // block_k
    return first, last


def _over_blocks(step, init, k_start: Array, k_end: Array, block_k: int, k: Array):
    """`init` after `step(j, ...)` for every block of keys that this block of queries may see."""
    if k.shape[2] == block_k:
        return step(0, init)
    return lax.fori_loop(*_visible_blocks(k_start, k_end, block_k), step, init)


def _block(x: Array, j: int | Array, size: int) -> Array:
    """Block j along the last axis: of keys, values or their gradients [B, K, H, S]."""
    return lax.dynamic_slice_in_dim(x, j * size, size, axis=-1)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _turned(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _scores(q: Array, k_j: Array, j: int | Array, k_start: Array, k_end: Array) -> Array:
    """Scaled scores [B, K, R, S] of one pair of blocks in float32, MASKED outside the intervals."""
    position = (j * k_j.shape[-1] + jnp.arange(k_j.shape[-1]))[None, None, :]
    inside = (position >= k_start[:, :, None]) & (position < k_end[:, :, None])
    return jnp.where(
        inside[:, None], _dot("bkrh,bkhs->bkrs", q, k_j) * (q.shape[-1] ** -0.5), MASKED
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(q: Array, k: Array, v: Array, k_start: Array, k_end: Array, block_k: int) -> Array:
    return _forward(q, k, v, k_start, k_end, block_k)[0]


def _forward(q, k, v, k_start, k_end, block_k):
    def rows(args):
        q, k, v, k_start, k_end = args
        k = _turned(k)

        def query_block(args):
            q, k_start, k_end = args

            def step(j, carry):
                peak, total, acc = carry
                s = _scores(q, _block(k, j, block_k), j, k_start, k_end)
                # At least MASKED / 2, so that masked scores vanish even in a row without a visible
                # key so far.
                new_peak = jnp.maximum(peak, s.max(-1))
                p = jnp.exp(s - new_peak[..., None])
                decay = jnp.exp(peak - new_peak)
                v_j = lax.dynamic_slice_in_dim(v, j * block_k, block_k, axis=2)
                acc = acc * decay[..., None] + _dot("bkrs,bksh->bkrh", p.astype(v.dtype), v_j)
                return new_peak, total * decay + p.sum(-1), acc

            rows = q.shape[:-1]
            init = jnp.full(rows, MASKED / 2), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32)
            peak, total, acc = _over_blocks(step, init, k_start, k_end, block_k, v)
            total = jnp.where(total > 0, total, 1.0)
            return (acc / total[..., None]).astype(q.dtype), peak + jnp.log(total)

        return lax.map(query_block, (q, k_start, k_end))

    out, logsumexp = kept(*lax.map(rows, (q, k, v, k_start, k_end)))
    return out, (q, k, v, k_start, k_end, out, logsumexp)


def _backward(block_k, residuals, d_out):
    return *lax.map(functools.partial(_rows_backward, block_k), (*residuals, d_out)), None, None


def _rows_backward(block_k, args):
    q, k, v, *of_queries = args
    scale = q.shape[-1] ** -0.5
    k_turned, v_turned = _turned(k), _turned(v)

    def query_block(carry, args):
        q, k_start, k_end, out, logsumexp, d_out = args
        q_turned, d_out_turned = _turned(q), _turned(d_out)
        delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

        def step(j, carry):
            dq, dk, dv = carry
            s = _scores(q, _block(k_turned, j, block_k), j, k_start, k_end)
            p = jnp.exp(s - logsumexp[..., None])
            dp = _dot("bkrh,bkhs->bkrs", d_out, _block(v_turned, j, block_k))
            ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
            dk_j = _dot("bkhr,bkrs->bkhs", q_turned, ds)
            dv_j = _dot("bkhr,bkrs->bkhs", d_out_turned, p.astype(v.dtype))
            dk, dv = (
                lax.dynamic_update_slice_in_dim(x, _block(x, j, block_k) + x_j, j * block_k, 3)
                for x, x_j in ((dk, dk_j), (dv, dv_j))
            )
            k_j = lax.dynamic_slice_in_dim(k, j * block_k, block_k, axis=2)
            return dq + _dot("bkrs,bksh->bkrh", ds, k_j), dk, dv

        init = (jnp.zeros(q.shape, jnp.float32), *carry)
        dq, dk, dv = _over_blocks(step, init, k_start, k_end, block_k, k)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k_turned.shape, jnp.float32), jnp.zeros(v_turned.shape, jnp.float32)
    (dk, dv), dq = lax.scan(query_block, zeros, (q, *of_queries))
    return dq, _turned(dk).astype(k.dtype), _turned(dv).astype(v.dtype)


_blocked.defvjp(_forward, _backward)
