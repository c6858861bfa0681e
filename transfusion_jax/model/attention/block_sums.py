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
    ROW_FIRST,
    ROW_LAST,
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


def block_sums(name, by, bounds, operands, results, sums, add, finish, blocks, row=None):
    """One kernel; returns its results.

    Args:
      by: whose blocks have sums: "query" (over keys), or "key" (over queries, and over the heads
        that share a key head).
      bounds: k_start and k_end, [B, L].
      operands, results: ("query" or "key", array or its shape); the first two operands are q and k.
      sums: (rows, initial value) of each.
      add: called for a pair with a function that masks scores [keys, queries], the operands' blocks
        and the sums, to which it adds.
      finish: called with the results' blocks and the sums; writes the results.
      row: of a sum by key that also sums over keys, for the queries of a whole row: the array or
        its shape, the first of the results, and a function that writes it from its sum. `add` gets
        the sum of the pair's queries last.

    Raises:
      ValueError: there are more pairs of blocks than the list has room for.
    """
    N, (_, K, _, S) = operands[0][1].shape[1], operands[1][1].shape
    table, count = _table(bounds, by, S, blocks)
    specs, grid = _specs(by, N // K, blocks), (N, count) if by == "query" else (K, count, N // K)
    bound_spec = specs("query", 1, per_head=False)
    out_specs = [specs(of, x.shape[2]) for of, x in results]
    scratch = [pltpu.VMEM((rows, getattr(blocks, by)), jnp.float32) for rows, _ in sums]
    if row is not None:
        shape = (N // K, *row[0].shape[2:])
        results = [("row", row[0]), *results]
        out_specs.insert(
            0, pl.BlockSpec((None, *shape), lambda k, t, g, row, *_: (row[t], k, 0, 0))
        )
        scratch.append(pltpu.VMEM(shape, jnp.float32))
    return pl.pallas_call(
        _kernel(by, N // K, len(operands), sums, add, finish, blocks, row and row[1]),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=grid,
            in_specs=[bound_spec, bound_spec, *(specs(of, x.shape[2]) for of, x in operands)],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * (len(grid) - 1)
        ),
        interpret=blocks.interpret,
        name=name,
    )(*table, *(bound[:, None, None, :] for bound in bounds), *(x for _, x in operands))


def check_pairs(rows: int, queries: int, keys: int, block: int) -> None:
    """Raises ValueError if so many rows on a device, in so many blocks of queries and of keys, may
    have more pairs than the list has room for."""
    pairs = rows * queries * keys
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"{rows} rows on a device in {queries} x {keys} blocks may make {pairs} pairs, and "
            f"there is room for {MOST_PAIRS}: take a model.attention_block above {block}"
        )


def _table(bounds, by, length, blocks):
    """The pairs of blocks and their number."""
    some, every = visible_blocks(*bounds, blocks.query, blocks.key, length // blocks.key)
    if not blocks.interpret:
        check_pairs(*some.shape, blocks.query)
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


def _kernel(by, group, operands, sums, add, finish, blocks, finish_row):
    """One step of the grid: begins the sums, adds a pair, writes the results."""

    def kernel(row, query, key, flags, start, end, *refs):
        operand_refs, refs, more = refs[:operands], refs[operands:], ()
        t = pl.program_id(1)
        if finish_row is not None:
            row_result, *refs, row_sum = refs
            queries = pl.ds(pl.multiple_of(query[t] * blocks.query, blocks.query), blocks.query)
            more = (row_sum.at[pl.program_id(2), :, queries],)
        result_refs, sum_refs = refs[: -len(sums)], refs[-len(sums) :]
        first, last = flags[t] & FIRST != 0, flags[t] & LAST != 0
        if by == "key":
            first, last = first & (pl.program_id(2) == 0), last & (pl.program_id(2) == group - 1)

        if finish_row is not None:

            @pl.when((flags[t] & ROW_FIRST != 0) & (pl.program_id(2) == 0))
            def _():
                row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)

        @pl.when(first)
        def _():
            for ref, (_, value) in zip(sum_refs, sums, strict=True):
                ref[...] = jnp.full(ref.shape, value, jnp.float32)

        @pl.when(flags[t] & FULL != 0)
        def _():
            add(lambda scores: scores, *operand_refs, *sum_refs, *more)

        @pl.when(flags[t] & (VISIBLE | FULL) == VISIBLE)
        def _():
            position = key[t] * blocks.key + lax.broadcasted_iota(
                jnp.int32, (blocks.key, blocks.query), 0
            )
            inside = (position >= start[...]) & (position < end[...])
            add(lambda scores: jnp.where(inside, scores, MASKED), *operand_refs, *sum_refs, *more)

        @pl.when(last)
        def _():
            finish(*result_refs, *sum_refs)

        if finish_row is not None:

            @pl.when((flags[t] & ROW_LAST != 0) & (pl.program_id(2) == group - 1))
            def _():
                finish_row(row_result, row_sum)

    return kernel
