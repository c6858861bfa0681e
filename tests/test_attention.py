import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest

from transfusion_jax.batch import Batch
from transfusion_jax.config import MeshConfig, ModelConfig
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.attention.platforms import for_platform, require_platform
from transfusion_jax.parallel.mesh import make_mesh


def qkv(shape_q, shape_k, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, s, dtype)
        for k, s in zip(keys, (shape_q, shape_k, shape_k), strict=True)
    )


def loops(q, k, v, seen):
    """Attention one query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, i])
        if len(keys):
            scores = k[b, keys, n // group] @ q[b, i, n] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, n] = weights / weights.sum() @ v[b, keys, n // group]
    return out


def all_packings() -> tuple[Batch, np.ndarray]:
    names = list(packings.PACKINGS.values())
    return jax.tree.map(jnp.asarray, packings.batch(names)), np.stack(
        [packings.mask(p) for p in names]
    )


def test_intervals_are_the_mask_of_the_recipe():
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    start, end, key = (
        np.asarray(intervals.k_start_BL),
        np.asarray(intervals.k_end_BL),
        np.arange(packings.LENGTH),
    )
    inside = (key >= start[..., None]) & (key < end[..., None])
    np.testing.assert_array_equal(inside, seen)


def test_dense_is_attention_by_hand():
    batch, seen = all_packings()
    q, k, v = qkv((len(seen), packings.LENGTH, 4, 8), (len(seen), packings.LENGTH, 2, 8))
    out = attention(q, k, v, row_intervals(batch, packings.P), implementation="dense")
    np.testing.assert_allclose(out, loops(q, k, v, seen), atol=1e-6)


@pytest.mark.parametrize("block", [5, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_chunked_equals_dense_forward_and_backward(block, kv_heads):
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    q, k, v = qkv((len(seen), packings.LENGTH, 4, 8), (len(seen), packings.LENGTH, kv_heads, 8))
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def run(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, intervals, implementation=implementation, block=block)
            return jnp.sum(out * weight), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (gradients, out), (expected_gradients, expected) = run("chunked"), run("dense")
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-6)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("axes", [dict(sequence=4), dict(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_rows_cut_over_devices_equal_whole_ones(implementation, axes):
    """Context parallelism, forward and backward: every device holds some positions and gathers the
    keys of all."""
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    rows = 8  # of the nine
    q, k, v = qkv((rows, packings.LENGTH, 4, 8), (rows, packings.LENGTH, 2, 8))
    intervals = jax.tree.map(lambda x: x[:rows], intervals)

    def run(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, intervals, implementation=implementation, block=16)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    (_, expected), expected_gradients = run("dense")(q, k, v)
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec(("data", "fsdp"), "sequence", "tensor")
        placed = jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, spec))
        (_, out), gradients = run(implementation)(*placed)
    assert out.sharding.shard_shape(out.shape)[1] == packings.LENGTH // axes["sequence"]
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-6)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
def test_arbitrary_intervals_over_a_longer_cache(implementation):
    """Queries and keys of different lengths, intervals that no packing would give, some of them
    empty."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 50, (3, 7)).astype(np.int32)
    end = (start + rng.integers(-5, 40, start.shape)).clip(0, 50).astype(np.int32)
    q, k, v = qkv((3, 7, 4, 8), (3, 50, 2, 8))
    seen = (np.arange(50) >= start[..., None]) & (np.arange(50) < end[..., None])
    assert (~seen).all(-1).any()
    intervals = Intervals(jnp.asarray(start), jnp.asarray(end))
    out = attention(q, k, v, intervals, implementation=implementation, block=16)
    np.testing.assert_allclose(out, loops(q, k, v, seen), atol=1e-6)


def test_bfloat16_accumulates_in_float32():
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    q, k, v = qkv(
        (len(seen), packings.LENGTH, 2, 8), (len(seen), packings.LENGTH, 2, 8), jnp.bfloat16
    )
    for implementation in ("dense", "chunked"):
        out = attention(q, k, v, intervals, implementation=implementation, block=16)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), loops(q, k, v, seen), atol=0.02)


def test_chunked_memory_grows_linearly():
    """The dense reference's temporaries grow fourfold when the row doubles, the chunked one's about
    twofold."""

    def temporaries(implementation, length):
        def loss(q, k, v):
            index = jnp.arange(length, dtype=jnp.int32)[None]
            intervals = Intervals(jnp.zeros_like(index), index + 1)
            return attention(q, k, v, intervals, implementation=implementation, block=128).sum()

        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("dense", 2048) / temporaries("dense", 1024) > 3.5
    assert temporaries("chunked", 4096) / temporaries("chunked", 2048) < 2.2


def test_unknown_implementation_is_refused():
    q, k, v = qkv((1, 4, 1, 8), (1, 4, 1, 8))
    index = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attention(q, k, v, Intervals(index, index), implementation="flash")


def test_an_implementation_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q, k, v = qkv((1, 4, 1, 8), (1, 4, 1, 8))
    index = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=re.escape("pip install 'transfusion-jax[gpu]'")):
        attention(q, k, v, Intervals(index, index), implementation="tokamax", interpret=True)


def test_a_gpu_is_cuda_to_lowering():
    require_platform("tokamax", "cuda")
    require_platform("tokamax", "gpu")
    with pytest.raises(
        ValueError, match="model.attention='tokamax' runs on cuda; on tpu: chunked, dense, pallas"
    ):
        require_platform("tokamax", "tpu")


@pytest.mark.parametrize(
    "platform, block, chosen", [("tpu", 0, ("pallas", 0)), ("tpu", 152, ("pallas", 0)), ("tpu", 256, ("pallas", 256)),
    ("cpu", 152, ("chunked", 152))],
)  # fmt: skip
def test_auto_is_chosen_by_platform(platform, block, chosen):
    model = for_platform(ModelConfig(attention_block=block), platform)
    assert (model.attention, model.attention_block) == chosen


def test_what_a_platform_cannot_run_is_refused_before_anything_is_built():
    with pytest.raises(
        ValueError, match="model.attention='pallas' runs on tpu; on cpu: chunked, dense"
    ):
        for_platform(ModelConfig(attention="pallas"), "cpu")
    with pytest.raises(ValueError, match="model.remat='offload' moves arrays from an accelerator"):
        for_platform(ModelConfig(remat="offload"), "cpu")
