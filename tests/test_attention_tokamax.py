import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    LENGTH,
    ROWS,
    any_intervals,
    assert_close,
    inputs,
    packed,
    random_packings,
)
from jax.extend import backend
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from transfusion_jax.config import MeshConfig
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.parallel.mesh import make_mesh

# JAX is dropping Triton support from Pallas.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
pytest.importorskip("tokamax", reason="needs tokamax (pip install 'transfusion-jax[gpu]')")


@functools.cache
def program(implementation: str = "tokamax", interpret: bool = True):
    """Output, and gradients of its weighted sum."""

    def loss(q, k, v, weight, k_start_BL, k_end_BL):
        intervals = Intervals(k_start_BL, k_end_BL)
        out = attention(q, k, v, intervals, implementation=implementation, interpret=interpret)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def values(arrays, intervals, *which):
    """The output and the gradients of q, k, v."""
    (_, out), gradients = program(*which)(*arrays, intervals.k_start_BL, intervals.k_end_BL)
    return out, *gradients


@pytest.mark.parametrize("N, K", [(4, 2), (2, 2), (3, 1)], ids=["GQA", "MHA", "MQA"])
def test_equals_dense_forward_and_backward_over_random_packings(N, K):
    arrays = inputs(N=N, K=K)
    intervals = packed(random_packings())
    assert_close(values(arrays, intervals), values(arrays, intervals, "dense"))


def test_any_intervals_over_a_longer_cache():
    """Some are empty, some reach past the keys."""
    arrays = inputs(3, 7, S=50)
    intervals = any_intervals((3, 7), 50)
    expected = values(arrays, intervals, "dense")
    assert_close(values(arrays, intervals), expected)
    end = jnp.where(intervals.k_end_BL == 50, 90, intervals.k_end_BL)
    beyond = Intervals(intervals.k_start_BL, end)
    assert_close(values(arrays, beyond), expected)


def test_bfloat16_accumulates_in_float32():
    arrays = inputs(dtype=jnp.bfloat16)
    intervals = packed(random_packings())
    with jax.numpy_dtype_promotion("standard"):  # "xla" mixes types when lowered
        results = values(arrays, intervals)
    assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
    exact = values([x.astype(jnp.float32) for x in arrays], intervals, "dense")
    assert_close(results, exact, atol=0.03, rtol=0.03)


def test_padding_gets_zeros_and_documents_do_not_leak():
    """One document's output has gradients in that document alone; padding gets 0."""
    *arrays, weight = inputs()
    seen = np.zeros((ROWS, LENGTH), bool)
    seen[0, 8:16] = True
    weighted = seen | (np.arange(LENGTH) >= 21)[None]
    weight = jnp.where(weighted[:, :, None, None], weight, 0.0)
    intervals = packed(["tttIt|Itttt|ttttt"] + [""] * (ROWS - 1))
    out, *gradients = (np.asarray(x) for x in values([*arrays, weight], intervals))
    np.testing.assert_array_equal(out[0, 21:], 0)
    np.testing.assert_array_equal(out[1:], 0)
    for gradient in gradients:
        assert (gradient[seen] != 0).any((1, 2)).all()
        np.testing.assert_array_equal(gradient[~seen], 0)


@pytest.mark.parametrize("rows", [ROWS, 3])
def test_sharded_equals_dense(rows):
    """Rows and heads are cut without any exchange; three rows are replicated instead."""
    arrays = [x[:rows] for x in inputs()]
    intervals = packed(random_packings()[:rows])
    expected = values(arrays, intervals, "dense")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp") if rows == ROWS else None, None, "tensor")
        arrays = jax.device_put(arrays, NamedSharding(mesh, spec))
        assert_close(values(arrays, intervals), expected)
        lowered = program().lower(*arrays, intervals.k_start_BL, intervals.k_end_BL)
        text = lowered.compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_it_is_refused_without_a_gpu():
    arrays = inputs(1, 8, 1, 1)
    intervals = any_intervals((1, 8), 8)
    traced = program("tokamax", False).trace(*arrays, intervals.k_start_BL, intervals.k_end_BL)
    message = "model.attention='tokamax' runs on cuda; on cpu: chunked, dense$"
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=("cpu",))


class Gpu(NamedTuple):
    """What tokamax reads of a GPU, to lower for one without having it."""

    device_kind: str
    compute_capability: str
    core_count: int
    platform: str = "gpu"


A100 = Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108)
H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 132)
B200 = Gpu("NVIDIA B200", "10.0", 148)
TRITON = "__gpu$xla.gpu.triton"
MOSAIC = "mosaic_gpu"


@pytest.mark.parametrize(
    "gpu, dtype, mosaic, triton",
    [
        (A100, "bfloat16", 0, 3),
        (H100, "bfloat16", 1, 2),
        (B200, "bfloat16", 1, 2),
        (H100, "float32", 0, 3),
    ],
    ids=lambda x: x.device_kind.split()[1][:4] if isinstance(x, Gpu) else None,
)
def test_it_lowers_to_kernels_without_a_gpu(monkeypatch, gpu, dtype, mosaic, triton):
    """tokamax's forward, our two backward; outside the kernels, no L x S array."""
    monkeypatch.setattr(backend, "get_default_device", lambda: gpu)
    L, N, H = 384, 4, 64
    q, k = (jax.ShapeDtypeStruct((2, L, heads, H), dtype) for heads in (N, 2))
    bound = jax.ShapeDtypeStruct((2, L), jnp.int32)
    device = AbstractDevice(gpu.device_kind, gpu.core_count, gpu.platform)
    mesh = AbstractMesh(
        (1,) * 4,
        ("data", "fsdp", "sequence", "tensor"),
        (AxisType.Auto,) * 4,
        abstract_device=device,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = program("tokamax", False).trace(q, k, k, q, bound, bound)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [text.count(f"custom_call @{name}") for name in (MOSAIC, TRITON)]
    assert kernels == [mosaic, triton]
    assert f"{L}x{L}x" not in text


@pytest.mark.skipif(all(d.platform != "gpu" for d in jax.devices()), reason="needs a GPU")
@pytest.mark.parametrize("H", [64, 128])
def test_equals_dense_on_a_gpu(H):
    """The kernel chosen for this GPU, with documents across blocks, an image and padding."""
    index = np.arange(512)
    start = np.where(index < 270, 0, 270)
    end = index + 1
    end[20:60] = 60
    start[400:] = end[400:] = 0
    intervals = Intervals(*(jnp.asarray(np.tile(x, (2, 1)), jnp.int32) for x in (start, end)))
    arrays = inputs(2, 512, 4, 2, H, dtype=jnp.bfloat16)
    exact = values([x.astype(jnp.float32) for x in arrays], intervals, "dense")
    assert_close(values(arrays, intervals, "tokamax", False), exact, atol=0.05, rtol=0.05)
