"""Interval attention on TPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) as Pallas kernels.

With scores s_ij = q_i . k_j / sqrt(H) over the keys j of query i's interval,

    lse_i = log sum_j exp(s_ij)      p_ij = exp(s_ij - lse_i)       o_i = sum_j p_ij v_j

are found in one pass over blocks of keys by an online softmax. The backward pass recomputes p from
lse:

    delta_i = do_i . o_i                    ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = sum_j ds_ij k_j / sqrt(H)        dk_j = sum_i ds_ij q_i / sqrt(H)
    dv_j = sum_i p_ij do_i

A kernel walks a list of pairs of blocks (`block_pairs.py`), prefetched as scalars: the grid is as
long as the list, and blocks outside every interval cost nothing. Sums stay in VMEM, in float32,
from the first pair of a block to its last (`block_sums.py`). dk and dv of a key head also sum over
the query heads that share it. One kernel finds all three gradients, five products for a pair, where
dq of a whole row has room in VMEM; else dq has a kernel of its own, and they take seven.

In these files positions come last, [B, N, H, L] and [B, K, H, S], and scores are [keys, queries]. A
head of 64 then fills the lanes of a register as well as one of 128, and what belongs to a query
(its interval, maximum, lse, delta) is a row that broadcasts over keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from transfusion_jax.model.attention.block_sums import LANES, MASKED, Blocks, block_sums
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import kept

MOST_ROW_BYTES = 4 * 2**20
"""Of VMEM for dq of a whole row: heads of 128 in a row of 4,096. Twice that fits with blocks of
512, not of 1,024."""


def pallas_attention(
    q_BLNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    intervals: Intervals,
    *,
    block_q: int,
    block_k: int,
    interpret: bool = False,
) -> Array:
    """Same contract as `attention`, on one device.

    Args:
      block_q, block_k: queries and keys in one block, multiples of 128.
      interpret: run the kernels' Python as plain XLA, on any platform and with any block. Slow; for
        tests.

    Raises:
      ValueError: a block is no multiple of 128, or, when lowered without `interpret`, the platform
        is not a TPU.
    """
    if not interpret and (block_q % LANES or block_k % LANES):
        raise ValueError(f"{block_q=} and {block_k=} must be multiples of {LANES}")
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    # A block need not be longer than its array.
    block_q, block_k = (
        min(block, -(-size // LANES) * LANES) for block, size in ((block_q, L), (block_k, S))
    )

    def positions_last(x: Array, block: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).transpose(0, 2, 3, 1)

    def padded(bound_BL: Array) -> Array:
        # Padding queries get an empty interval, and no interval reaches into padding keys.
        return jnp.pad(jnp.clip(bound_BL, 0, S), ((0, 0), (0, -L % block_q)))

    k, v = positions_last(k_BSKH, block_k), positions_last(v_BSKH, block_k)
    k_start, k_end = padded(intervals.k_start_BL), padded(intervals.k_end_BL)
    out = _attention(
        k_start, k_end, positions_last(q_BLNH, block_q), k, v, Blocks(block_q, block_k, interpret)
    )
    return out.transpose(0, 3, 1, 2)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(k_start, k_end, q, k, v, blocks):
    return _forward(k_start, k_end, q, k, v, blocks)[0]


def _forward(k_start, k_end, q, k, v, blocks):
    out, lse = kept(*_output(k_start, k_end, q, k, v, blocks=blocks))
    return out, (k_start, k_end, q, k, v, out, lse)


def _backward(blocks, residuals, d_out):
    *arrays, out, lse = residuals
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(2, keepdims=True)
    return None, None, *_gradients(*arrays, d_out, lse, delta, blocks=blocks)


_attention.defvjp(_forward, _backward)


def _output(k_start, k_end, q, k, v, *, blocks):
    """o and lse, [B, N, H, L] and [B, N, 1, L]."""
    B, N, H, L = q.shape
    results = ("query", q), ("query", jax.ShapeDtypeStruct((B, N, 1, L), jnp.float32))
    # At least MASKED / 2, so that masked scores vanish even in a query without a visible key so
    # far.
    sums = (1, MASKED / 2), (1, 0.0), (H, 0.0)

    def add(masked, q, k, v, peak, total, acc):
        s = masked(_scores(q, k))
        new_peak = jnp.maximum(peak[...], s.max(0, keepdims=True))
        p, decay = jnp.exp(s - new_peak), jnp.exp(peak[...] - new_peak)
        peak[...] = new_peak
        total[...] = total[...] * decay + p.sum(0, keepdims=True)
        acc[...] = acc[...] * decay + _dot(v[...], p.astype(v.dtype), 1, 0)

    def finish(out, lse, peak, total, acc):
        seen = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (acc[...] / seen).astype(out.dtype)
        lse[...] = peak[...] + jnp.log(seen)

    operands = ("query", q), ("key", k), ("key", v)
    bounds = k_start, k_end
    return block_sums(
        "interval_attention", "query", bounds, operands, results, sums, add, finish, blocks
    )


def _gradients(k_start, k_end, q, k, v, d_out, lse, delta, *, blocks):
    """dq, dk and dv, shaped like q, k and v."""
    H = q.shape[2]
    operands = (
        ("query", q),
        ("key", k),
        ("key", v),
        ("query", d_out),
        ("query", lse),
        ("query", delta),
    )

    def p_ds(masked, q, k, v, d_out, lse, delta):
        p = jnp.exp(masked(_scores(q, k)) - lse[...])
        ds = p * (_dot(v[...], d_out[...], 0, 0) - delta[...])
        return p.astype(v.dtype), ds.astype(q.dtype)

    def add_q(masked, q, k, v, d_out, lse, delta, acc):
        _, ds = p_ds(masked, q, k, v, d_out, lse, delta)
        acc[...] += _dot(k[...], ds, 1, 0)

    def finish_q(dq, acc):
        dq[...] = (acc[...] * H**-0.5).astype(dq.dtype)

    def add_kv(masked, q, k, v, d_out, lse, delta, acc_k, acc_v):
        p, ds = p_ds(masked, q, k, v, d_out, lse, delta)
        acc_k[...] += _dot(q[...], ds, 1, 1)
        acc_v[...] += _dot(d_out[...], p, 1, 1)
        return ds

    def finish_kv(dk, dv, acc_k, acc_v):
        finish_q(dk, acc_k)
        dv[...] = acc_v[...].astype(dv.dtype)

    def add(masked, q, k, *others):
        *others, acc_q = others
        acc_q[...] += _dot(k[...], add_kv(masked, q, k, *others), 1, 0)

    run = functools.partial(block_sums, bounds=(k_start, k_end), operands=operands, blocks=blocks)
    by_key = dict(results=[("key", k), ("key", v)], sums=[(H, 0.0)] * 2, finish=finish_kv)
    # The sum in float32, and two buffers of what is written.
    row_bytes = q[0].size // k.shape[1] * (4 + 2 * q.dtype.itemsize)
    if row_bytes <= MOST_ROW_BYTES:
        return run("interval_attention_dqkv", "key", add=add, row=(q, finish_q), **by_key)
    (dq,) = run(
        "interval_attention_dq", "query",
        results=[("query", q)], sums=[(H, 0.0)], add=add_q, finish=finish_q,
    )  # fmt: skip
    dk, dv = run("interval_attention_dkv", "key", add=add_kv, **by_key)
    return dq, dk, dv


def _dot(a, b, axis_a: int, axis_b: int):
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def _scores(q, k):
    """[keys, queries]"""
    return _dot(k[...], q[...], 0, 0) * q.shape[0] ** -0.5
