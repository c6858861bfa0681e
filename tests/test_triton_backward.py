"""The backward kernels for GPUs, in interpret mode, against the dense reference's gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import any_intervals, assert_close, inputs, packed, random_packings

from transfusion_jax.model.attention.dense import dense_attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.triton_backward import Tiles, gradients

# JAX is dropping Triton support from Pallas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def logsumexp(q, k, intervals):
    """[B, N, L] in float32; of a query without keys it does not matter."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("blnh,bsnh->bnls", q, k) * q.shape[3] ** -0.5
    at = jnp.arange(k.shape[1])[None, None, :]
    inside = (at >= intervals.k_start_BL[:, :, None]) & (at < intervals.k_end_BL[:, :, None])
    return jax.nn.logsumexp(jnp.where(inside[:, None], scores, -1e9), axis=-1)


@jax.jit
def expected(q, k, v, d_out, intervals):
    out, backward = jax.vjp(lambda *arrays: dense_attention(*arrays, intervals), q, k, v)
    return out, backward(d_out)


@functools.partial(jax.jit, static_argnames="block")
def found(q, k, v, d_out, out, lse, intervals, block=16):
    bounds = intervals.k_start_BL, intervals.k_end_BL
    tiles = Tiles(block)
    return gradients(*bounds, q, k, v, out, lse, d_out, tiles=tiles, interpret=True)


CASES = {
    "GQA": (dict(N=4, K=2), None),
    "MQA, heads of 24": (dict(N=3, K=1, H=24), None),
    "longer cache": (dict(B=3, L=7, S=50), any_intervals((3, 7), 50)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 5e-6), (jnp.bfloat16, 0.04)])
def test_equals_dense(case, dtype, limit):
    shape, intervals = CASES[case]
    intervals = packed(random_packings()) if intervals is None else intervals
    arrays = inputs(**shape, dtype=dtype)
    exact = [x.astype(jnp.float32) for x in arrays]
    out, gradient = expected(*exact, intervals)
    lse = logsumexp(*exact[:2], intervals)
    assert_close(found(*arrays, out.astype(dtype), lse, intervals), gradient, limit, limit)


def test_blocks_outside_every_interval_are_not_read():
    """The second of three documents, each of whole blocks, is no number; the others are right."""
    length, block = 96, 16
    index = np.arange(length)
    start = np.tile(index // 32 * 32, (1, 1)).astype(np.int32)
    intervals = Intervals(jnp.asarray(start), jnp.asarray(index[None].astype(np.int32) + 1))
    arrays = inputs(1, length)
    out, gradient = expected(*arrays, intervals)
    poisoned = [x.at[:, 32:64].set(jnp.nan) for x in (*arrays, out)]
    lse = logsumexp(*arrays[:2], intervals).at[:, :, 32:64].set(jnp.nan)
    results = found(*poisoned, lse, intervals, block=block)
    for result, exact in zip(results, gradient, strict=True):
        assert np.isnan(result[:, 32:64]).any()
        for part in (slice(0, 32), slice(64, 96)):
            assert_close(result[:, part], exact[:, part])
