"""The pairs of blocks that a kernel computes, listed from the intervals before it starts.

A pair (block of queries, block of keys) is on the list if some query in it sees some key in it, so
blocks outside every interval are neither computed nor fetched. The list is sorted by query block
where the kernel sums over keys (the output, dq), and by key block where it sums over queries (dk,
dv): the pairs of one sum are neighbours.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# Bits of a pair's flags.
VISIBLE = 1  # some query sees some key
FULL = 2  # every query sees every key, so nothing is masked
FIRST = 4  # of its sum
LAST = 8  # of its sum
ROW_FIRST = 16  # of its row
ROW_LAST = 32  # of its row


class BlockPairs(NamedTuple):
    """Four int32 arrays of one length, of which the first `count` entries are pairs: the row, its
    two blocks, and flags."""

    row: Array
    query: Array
    key: Array
    flags: Array


def visible_blocks(
    k_start_BL: Array, k_end_BL: Array, block_q: int, block_k: int, blocks_k: int
) -> tuple[Array, Array]:
    """[B, query blocks, key blocks]: whether any query sees any key, and whether all see all.

    The block divides L. For the intervals [0, 1) [0, 2) [0, 4) [0, 4) and blocks of 2, 2 any is
    [[1, 0], [1, 1]] and all is [[0, 0], [1, 1]].
    """
    B, L = k_start_BL.shape
    start, end = (x.reshape(B, L // block_q, block_q, 1) for x in (k_start_BL, k_end_BL))
    begin = (jnp.arange(blocks_k, dtype=start.dtype) * block_k)[None, None, None, :]
    some = (jnp.maximum(start, begin) < jnp.minimum(end, begin + block_k)).any(2)
    every = ((start <= begin) & (end >= begin + block_k)).all(2)
    return some, every


def block_pairs(some: Array, every: Array, *, by: str) -> tuple[BlockPairs, Array]:
    """The pairs and their number, sorted by row, then by the block of `by` ("query" or "key"), then
    by the other.

    A block that is in no pair still gets one, without VISIBLE, since its (zero) sum has to be
    written. That pair names the block that the row fetched last, so nothing is fetched for it.
    """
    if by == "key":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    inner = jnp.arange(some.shape[2], dtype=jnp.int32)[None, :]
    fetched_last = jnp.where(some.any(1), inner, 0).max(1, keepdims=True)
    none = ~some.any(2, keepdims=True)
    listed = some | (none & (inner == fetched_last)[:, None, :])

    at = jnp.flatnonzero(listed, size=listed.size, fill_value=0).astype(jnp.int32)
    total, inner = jnp.divmod(at, some.shape[2])
    row, outer = jnp.divmod(total, some.shape[1])
    count, step = listed.sum(dtype=jnp.int32), jnp.arange(listed.size, dtype=jnp.int32)
    first = (total != jnp.roll(total, 1)) | (step == 0)
    last = jnp.roll(first, -1) | (step == count - 1)
    flags = (jnp.where(some, VISIBLE, 0) + jnp.where(every, FULL, 0)).reshape(-1)[at]
    flags = flags + jnp.where(first, FIRST, 0) + jnp.where(last, LAST, 0)
    row_first = (row != jnp.roll(row, 1)) | (step == 0)
    row_last = jnp.roll(row_first, -1) | (step == count - 1)
    flags = flags + jnp.where(row_first, ROW_FIRST, 0) + jnp.where(row_last, ROW_LAST, 0)
    query, key = (outer, inner) if by == "query" else (inner, outer)
    return BlockPairs(row, query, key, flags), count
