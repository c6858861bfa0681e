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
    shapes = (shape_q, shape_k, shape_k)
    return tuple(
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def loops(q, k, v, seen):
    """Attention by loops over queries and heads, in float64; 0 where a query sees nothing."""
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
    """All packings as a batch, and their masks [B, L, L]."""
    rows = list(packings.PACKINGS.values())
    batch = jax.tree.map(jnp.asarray, packings.batch(rows))
    return batch, np.stack([packings.mask(row) for row in rows])


def test_intervals_are_the_mask_of_the_paper():
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    start = np.asarray(intervals.k_start_BL)[..., None]
    end = np.asarray(intervals.k_end_BL)[..., None]
    key = np.arange(packings.LENGTH)
    np.testing.assert_array_equal((key >= start) & (key < end), seen)


def test_dense_equals_loops():
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

    gradients, out = run("chunked")
    expected_gradients, expected = run("dense")
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-6)


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("axes", [dict(sequence=4), dict(fsdp=2, sequence=2, tensor=2)], ids=str)
def test_context_parallel_equals_a_single_device(implementation, axes):
    """Forward and backward: each device holds some positions and all-gathers keys and values."""
    batch, _ = all_packings()
    intervals = row_intervals(batch, packings.P)
    rows = 8  # out of nine, so the mesh divides them
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
    """Fewer queries than keys, and intervals that no packing gives, some of them empty."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 50, (3, 7)).astype(np.int32)
    end = (start + rng.integers(-5, 40, start.shape)).clip(0).astype(np.int32)
    assert end.max() > 50 + 16  # more than a block past the last key
    q, k, v = qkv((3, 7, 4, 8), (3, 50, 2, 8))
    seen = (np.arange(50) >= start[..., None]) & (np.arange(50) < end[..., None])
    assert (~seen).all(-1).any()
    intervals = Intervals(jnp.asarray(start), jnp.asarray(end))
    out = attention(q, k, v, intervals, implementation=implementation, block=16)
    np.testing.assert_allclose(out, loops(q, k, v, seen), atol=1e-6)


def test_bfloat16_accumulates_in_float32():
    batch, seen = all_packings()
    intervals = row_intervals(batch, packings.P)
    shape = (len(seen), packings.LENGTH, 2, 8)
    q, k, v = qkv(shape, shape, jnp.bfloat16)
    for implementation in ("dense", "chunked"):
        out = attention(q, k, v, intervals, implementation=implementation, block=16)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), loops(q, k, v, seen), atol=0.02)


def test_chunked_memory_grows_linearly():
    """Doubling the row quadruples the temporaries of dense, and about doubles those of chunked."""

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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q, k, v = qkv((1, 4, 1, 8), (1, 4, 1, 8))
    index = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=re.escape("pip install 'transfusion-jax[gpu]'")):
        attention(q, k, v, Intervals(index, index), implementation="tokamax", interpret=True)


def test_gpu_and_cuda_are_the_same_platform():
    require_platform("tokamax", "cuda")
    require_platform("tokamax", "gpu")
    message = "model.attention='tokamax' runs on cuda; on tpu: chunked, dense, pallas"
    with pytest.raises(ValueError, match=message):
        require_platform("tokamax", "tpu")


@pytest.mark.parametrize(
    "platform, block, chosen",
    [
        ("tpu", 0, ("pallas", 0)),
        ("tpu", 152, ("pallas", 0)),
        ("tpu", 256, ("pallas", 256)),
        ("cpu", 152, ("chunked", 152)),
    ],
)
def test_auto_depends_on_the_platform(platform, block, chosen):
    model = for_platform(ModelConfig(attention_block=block), platform)
    assert (model.attention, model.attention_block) == chosen


@pytest.mark.parametrize(
    "platform, remat, loop",
    [
        ("gpu", "minimal", "unroll"),
        ("gpu", "none", "unroll"),
        ("gpu", "full", "scan"),
        ("cpu", "none", "scan"),
        ("tpu", "minimal", "scan"),
    ],
)
def test_layers_are_written_out_on_a_gpu_that_keeps_much(platform, remat, loop):
    assert for_platform(ModelConfig(remat=remat), platform).layer_loop == loop
    chosen = ModelConfig(remat=remat, layer_loop="scan")
    assert for_platform(chosen, platform).layer_loop == "scan"


def test_layers_are_not_written_out_where_memory_is_saved():
    with pytest.raises(ValueError, match="'unroll' would lose the memory.*remat='full'"):
        ModelConfig(remat="full", layer_loop="unroll")


def test_what_a_platform_cannot_run_is_refused_from_the_config_alone():
    message = "model.attention='pallas' runs on tpu; on cpu: chunked, dense"
    with pytest.raises(ValueError, match=message):
        for_platform(ModelConfig(attention="pallas"), "cpu")
    with pytest.raises(ValueError, match="model.remat='offload' moves arrays from an accelerator"):
        for_platform(ModelConfig(remat="offload"), "cpu")
