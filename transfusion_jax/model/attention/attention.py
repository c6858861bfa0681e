"""Attention over intervals: query i sees the keys [k_start_i, k_end_i) and no others.

Two integers per position describe packing, causality and the bidirectional attention inside images
exactly (`intervals.py`); only the dense reference builds an L x L array.
"""

import functools

import jax

from transfusion_jax.model.attention.chunked import chunked_attention
from transfusion_jax.model.attention.dense import dense_attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.pallas import pallas_attention
from transfusion_jax.model.attention.platforms import (
    DEFAULT_BLOCK,
    PLATFORMS,
    automatic,
    refuse_other_platforms,
)
from transfusion_jax.model.attention.sharded import on_shards
from transfusion_jax.model.attention.tokamax import tokamax_attention
from transfusion_jax.shapes import BLNH, BSKH


def attention(
    q_BLNH: BLNH,
    k_BSKH: BSKH,
    v_BSKH: BSKH,
    intervals: Intervals,
    *,
    implementation: str,
    block: int = 0,
    interpret: bool = False,
) -> BLNH:
    """Softmax attention of every query over its interval of keys, scaled by 1 / sqrt(H).

    Query heads are grouped: heads [k * G, (k + 1) * G) share key head k, G = N / K. A query whose
    interval is empty gets zeros. Softmax is in float32, the result in q's dtype. Under a mesh every
    device works on its own rows, positions and heads. "auto" is the implementation for the default
    backend. Blocks have `block` positions; 0 is the implementation's default. `interpret` lets
    "pallas" and "tokamax" run anywhere, slowly, for tests.

    Raises:
      ValueError: the implementation is unknown or not installed, or, when lowered, it does not run
        on that platform.
    """
    if implementation == "auto":
        # A training step knows its platform and names one (`platforms.for_platform`).
        implementation, block = automatic(jax.default_backend(), block)
    if implementation not in PLATFORMS:
        raise ValueError(f"{implementation=} is not one of {', '.join(map(repr, PLATFORMS))}")
    if PLATFORMS[implementation] is not None and not interpret:
        k_start_BL = refuse_other_platforms(intervals.k_start_BL, implementation)
        intervals = Intervals(k_start_BL, intervals.k_end_BL)
    block = block or DEFAULT_BLOCK.get(implementation, 0)
    attend = {
        "dense": dense_attention,
        "chunked": functools.partial(chunked_attention, block=block),
        "pallas": functools.partial(
            pallas_attention, block_q=block, block_k=block, interpret=interpret
        ),
        "tokamax": functools.partial(
            tokamax_attention, implementation="xla" if interpret else None
        ),
    }[implementation]
    return on_shards(attend, q_BLNH, k_BSKH, v_BSKH, intervals)
