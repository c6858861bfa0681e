"""Arrays and intervals on which attention kernels are compared with the dense reference."""

import jax
import jax.numpy as jnp
import numpy as np
import packings

from transfusion_jax.model.attention.intervals import Intervals, row_intervals

ROWS = 16
LENGTH = packings.LENGTH


def random_packings() -> list[str]:
    """Random rows of text, images and document ends; the first is all padding."""
    rng = np.random.default_rng(0)
    rows = [""]
    while len(rows) < ROWS:
        row = "".join(rng.choice(list("tttttI|"), rng.integers(1, LENGTH)))
        images = row.count("I")
        if len(row) + (packings.P - 1) * images <= LENGTH and images <= packings.SLOTS:
            rows.append(row)
    return rows


def packed(rows: list[str]) -> Intervals:
    """Intervals of rows written as in `packings`."""
    return row_intervals(jax.tree.map(jnp.asarray, packings.batch(rows)), packings.P)


def any_intervals(shape: tuple[int, int], keys: int) -> Intervals:
    """Random intervals that no packing gives, a third of them empty."""
    rng = np.random.default_rng(1)
    start = rng.integers(0, keys, shape).astype(np.int32)
    end = (start + rng.integers(-keys // 4, keys // 2, shape)).clip(0, keys).astype(np.int32)
    return Intervals(jnp.asarray(start), jnp.asarray(end))


def inputs(B=ROWS, L=LENGTH, N=4, K=2, H=8, S=None, dtype=jnp.float32):
    """Random q, k, v and weights of the output; S keys, or as many as queries."""
    rng = np.random.default_rng(0)
    queries = (B, L, N, H)
    keys = (B, S or L, K, H)
    shapes = (queries, keys, keys, queries)
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def assert_close(results, expected, atol=5e-6, rtol=2e-6):
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result.astype(jnp.float32), reference, atol=atol, rtol=rtol)
