"""Sums over the pairs of each block, as a Pallas TPU kernel: what output, dq, and dk with dv have
in common.

Arrays are [B, heads, rows, positions]: queries, or what belongs to a query (rows = 1), have N
heads, keys and values have K. A sum stays in VMEM, in float32, while the grid goes through the
pairs of its block, which are neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from transfusion_jax.model.attention.block_pairs import (
    FIRST,
    FULL,
    LAST,
    VISIBLE,
    block_pairs,
    visible_blocks,
)

MASKED = -1e30  # a finite stand-in: -inf minus -inf is NaN
LANES = 128
MOST_PAIRS = 64_000  # the list is in scalar memory, 1 MiB, with 16 bytes for a pair


class Blocks(NamedTuple):
    query: int
    key: int
    interpret: bool


def block_sums(name, by, bounds, operands, results, sums, add, finish, blocks):
    """One kernel; returns its results.

    Args:
      by: whose blocks have sums: "query" (over keys), or "key" (over queries and the heads that
        share a key head).
      bounds: k_start and k_end, [B, L].
      operands, results: ("query" or "key", array or its shape); the first two operands are q and k.
      sums: (rows, initial value) of each.
      add: called for a pair with a function that masks scores [keys, queries], the operands' blocks
        and the sums; adds to these.
      finish: called with the results' blocks and the sums; writes the results.

    Raises:
      ValueError: there are more pairs of blocks than the list has room for.
    """
    N, (_, K, _, S) = operands[0][1].shape[1], operands[1][1].shape
    table, count = _table(bounds, by, S, blocks)
    specs, grid = _specs(by, N // K, blocks), (N, count) if by == "query" else (K, count, N // K)
    bound_spec = specs("query", 1, per_head=False)
    return pl.pallas_call(
        _kernel(by, N // K, len(operands), sums, add, finish, blocks),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=grid,
            in_specs=[bound_spec, bound_spec, *(specs(of, x.shape[2]) for of, x in operands)],
            out_specs=[specs(of, x.shape[2]) for of, x in results],
            scratch_shapes=[
                pltpu.VMEM((rows, getattr(blocks, by)), jnp.float32) for rows, _ in sums
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * (len(grid) - 1)
        ),
        interpret=blocks.interpret,
        name=name,
    )(*table, *(bound[:, None, None, :] for bound in bounds), *(x for _, x in operands))


def _table(bounds, by, length, blocks):
    """The pairs of blocks and their number."""
    some, every = visible_blocks(*bounds, blocks.query, blocks.key, length // blocks.key)
    if some.size > MOST_PAIRS and not blocks.interpret:
        raise ValueError(
            f"{len(some)} rows on a device in {some.shape[1]} x {some.shape[2]} blocks may make {some.size} pairs, "
            f"and there is room for {MOST_PAIRS}: take a model.attention_block above {blocks.query}"
        )
    return block_pairs(some, every, by=by)


def _specs(by, group, blocks):
    """Which block of an array a step of the grid works on."""

    def specs(of, rows, per_head=True):
        def by_query(n, t, row, query, key, flags):
            return block(n, lax.div(n, np.int32(group)), row[t], query[t], key[t])

        def by_key(k, t, g, row, query, key, flags):
            return block(k * group + g, k, row[t], query[t], key[t])

        def block(n, k, row, query, key):
            return (row, n if per_head else 0, 0, query) if of == "query" else (row, k, 0, key)

        return pl.BlockSpec(
            (None, None, rows, getattr(blocks, of)), by_query if by == "query" else by_key
        )

    return specs


def _kernel(by, group, operands, sums, add, finish, blocks):
    """One step of the grid: begins the sums, adds a pair, writes the results."""

    def kernel(row, query, key, flags, start, end, *refs):
        operand_refs, result_refs = refs[:operands], refs[operands : -len(sums)]
        sum_refs = refs[-len(sums) :]
        t = pl.program_id(1)
        first, last = flags[t] & FIRST != 0, flags[t] & LAST != 0
        if by == "key":
            first, last = first & (pl.program_id(2) == 0), last & (pl.program_id(2) == group - 1)

        @pl.when(first)
        def _():
            for ref, (_, value) in zip(sum_refs, sums, strict=True):
                ref[...] = jnp.full(ref.shape, value, jnp.float32)

        @pl.when(flags[t] & FULL != 0)
        def _():
            add(lambda scores: scores, *operand_refs, *sum_refs)

        @pl.when(flags[t] & (VISIBLE | FULL) == VISIBLE)
        def _():
            position = key[t] * blocks.key + lax.broadcasted_iota(
                jnp.int32, (blocks.key, blocks.query), 0
            )
            inside = (position >= start[...]) & (position < end[...])
            add(lambda scores: jnp.where(inside, scores, MASKED), *operand_refs, *sum_refs)

        @pl.when(last)
        def _():
            finish(*result_refs, *sum_refs)

    return kernel
