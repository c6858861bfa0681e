"""The backward pass of interval attention on GPU, as two Pallas kernels for Triton.

The equations are those of `pallas.py`. A program makes the gradients of one block of keys, or of
one block of queries, and walks only the other blocks that some interval reaches: what lies outside
every interval is neither fetched nor computed. (tokamax's backward passes compute all of it.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from transfusion_jax.model.attention.block_pairs import visible_blocks


class Tiles(NamedTuple):
    """How the kernels are cut; untuned, `benchmarks/attention_parity.py` times others."""

    block: int = 64
    """Queries, and keys: a power of two."""
    warps: int = 4
    stages: int = 2
    """Depth of Triton's pipeline of loads."""


UNTUNED = Tiles()


def gradients(
    k_start_BL: Array,
    k_end_BL: Array,
    q_BLNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    out_BLNH: Array,
    lse_BNL: Array,
    d_out_BLNH: Array,
    *,
    tiles: Tiles = UNTUNED,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, shaped like q, k and v.

    Args:
      lse_BNL: the logarithm of the sum of exponentials of the scores, in float32.
      interpret: run on any platform, slowly; for tests.
    """
    (B, L, N, H), (S, K) = q_BLNH.shape, k_BSKH.shape[1:3]
    block = tiles.block
    delta_BNL = jnp.einsum(
        "blnh,blnh->bnl", out_BLNH, d_out_BLNH, preferred_element_type=jnp.float32
    )

    def padded(x: Array, axis: int) -> Array:
        # Queries of the padding have empty intervals, and no interval reaches keys of it.
        widths = [(0, -x.shape[a] % block if a == axis else 0) for a in range(x.ndim)]
        if x.ndim == 4:  # Triton's arrays have powers of two, and its products at least 16.
            widths[3] = 0, max(16, pl.next_power_of_2(H)) - H
        return jnp.pad(x, widths)

    start, end = padded(k_start_BL, 1), padded(k_end_BL, 1)
    some, _ = visible_blocks(start, end, block, block, -(-S // block))
    operands = (
        padded(q_BLNH, 1), padded(k_BSKH, 1), padded(v_BSKH, 1), padded(d_out_BLNH, 1),
        padded(lse_BNL, 2), padded(delta_BNL, 2), start, end,
    )  # fmt: skip
    run = functools.partial(_run, operands, tiles, H**-0.5, interpret)
    (dq,) = run(_query_kernel, "interval_attention_dq", some, [q_BLNH.dtype])
    # Of each query head; those that share a key head are added up.
    dtype = k_BSKH.dtype if N == K else jnp.float32
    dk, dv = run(_key_kernel, "interval_attention_dkv", some.swapaxes(1, 2), [dtype, dtype])
    dk, dv = (
        x[:, :S, :, :H].reshape(B, S, K, N // K, H).sum(3).astype(k_BSKH.dtype) for x in (dk, dv)
    )
    return dq[:, :L, :, :H], dk, dv


def _run(operands, tiles, scale, interpret, kernel, name, some, dtypes):
    """Results [B, blocks * block, N, H], one for each dtype, of programs for a block, head, row.

    `some` [B, blocks, others] says which blocks see each other.
    """
    from jax.experimental.pallas import triton  # JAX warns of its end

    q, k, *_ = operands
    B, _, N, H = q.shape
    blocks, others = some.shape[1:]
    group = N // k.shape[2]
    first = jnp.argmax(some, 2).astype(jnp.int32)
    last = jnp.where(some.any(2), others - jnp.argmax(some[:, :, ::-1], 2), first)

    def whole(x, head):
        return pl.BlockSpec((None, x.shape[1], None, H), lambda i, n, b: (b, 0, head(n), 0))

    per_head = pl.BlockSpec((None, None, q.shape[1]), lambda i, n, b: (b, n, 0))
    per_row = pl.BlockSpec((None, q.shape[1]), lambda i, n, b: (b, 0))
    reach = pl.BlockSpec((None, blocks), lambda i, n, b: (b, 0))
    result = pl.BlockSpec((None, tiles.block, None, H), lambda i, n, b: (b, i, n, 0))
    queries = whole(q, lambda n: n)
    keys = whole(k, lambda n: lax.div(n, jnp.int32(group)))
    return pl.pallas_call(
        functools.partial(kernel, block=tiles.block, scale=scale),
        grid=(blocks, N, B),
        in_specs=[
            reach, reach, queries, keys, keys, queries, per_head, per_head, per_row, per_row,
        ],
        out_specs=[result] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct((B, blocks * tiles.block, N, H), x) for x in dtypes],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
    )(first, last.astype(jnp.int32), *operands)  # fmt: skip


def _weights(scores, lse, inside, scale):
    """p: exp(scores * scale - lse) inside the intervals, else 0."""
    return jnp.where(inside, jnp.exp(scores * scale - lse), 0.0)


def _query_kernel(first, last, q, k, v, d_out, lse, delta, start, end, dq, *, block, scale):
    i = pl.program_id(0)
    at = pl.ds(i * block, block)
    q_block, d_out_block = q[at, :], d_out[at, :]
    lse_column, delta_column = lse[at][:, None], delta[at][:, None]
    start_column, end_column = start[at][:, None], end[at][:, None]

    def add(j, total):
        to = pl.ds(j * block, block)
        k_block, v_block = k[to, :], v[to, :]
        position = j * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
        inside = (position >= start_column) & (position < end_column)
        p = _weights(_dot(q_block, k_block.T), lse_column, inside, scale)
        ds = p * (_dot(d_out_block, v_block.T) - delta_column)
        return total + _dot(ds.astype(k_block.dtype), k_block)

    total = lax.fori_loop(first[i], last[i], add, jnp.zeros(q_block.shape, jnp.float32))
    dq[...] = (total * scale).astype(dq.dtype)


def _key_kernel(first, last, q, k, v, d_out, lse, delta, start, end, dk, dv, *, block, scale):
    """Scores are [keys, queries]."""
    j = pl.program_id(0)
    to = pl.ds(j * block, block)
    k_block, v_block = k[to, :], v[to, :]
    position = j * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)

    def add(i, sums):
        at = pl.ds(i * block, block)
        q_block, d_out_block = q[at, :], d_out[at, :]
        inside = (position >= start[at][None, :]) & (position < end[at][None, :])
        p = _weights(_dot(k_block, q_block.T), lse[at][None, :], inside, scale)
        ds = p * (_dot(v_block, d_out_block.T) - delta[at][None, :])
        sum_k, sum_v = sums
        sum_k = sum_k + _dot(ds.astype(q_block.dtype), q_block)
        return sum_k, sum_v + _dot(p.astype(d_out_block.dtype), d_out_block)

    zero = jnp.zeros(k_block.shape, jnp.float32)
    sum_k, sum_v = lax.fori_loop(first[j], last[j], add, (zero, zero))
    dk[...] = (sum_k * scale).astype(dk.dtype)
    dv[...] = sum_v.astype(dv.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
