import functools
import importlib.util
from types import SimpleNamespace

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
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from transfusion_jax.config import DataConfig, Experiment, MeshConfig, ModelConfig
from transfusion_jax.model import block, transformer
from transfusion_jax.model.attention import pallas
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.block_pairs import (
    FIRST,
    FULL,
    LAST,
    VISIBLE,
    block_pairs,
    visible_blocks,
)
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.pallas import pallas_attention
from transfusion_jax.model.attention.sharded import on_shards
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.planning.topology import find_topology
from transfusion_jax.pretraining.state import _check_blocks


@functools.cache
def program(*blocks: int):
    """Output, and gradients of its weighted sum, of the kernels with these blocks.

    Without blocks, those of the dense reference.
    """

    def loss(q, k, v, weight, k_start_BL, k_end_BL):
        intervals = Intervals(k_start_BL, k_end_BL)
        if blocks:
            kernel = functools.partial(
                pallas_attention, block_q=blocks[0], block_k=blocks[1], interpret=True
            )
            out = on_shards(kernel, q, k, v, intervals)
        else:
            out = attention(q, k, v, intervals, implementation="dense")
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def values(arrays, intervals, *blocks):
    """The output and the gradients of q, k, v."""
    (_, out), gradients = program(*blocks)(*arrays, intervals.k_start_BL, intervals.k_end_BL)
    return out, *gradients


@pytest.mark.parametrize(
    "N, K, blocks", [(4, 2, (16, 8)), (2, 2, (8, 16)), (3, 1, (5, 7))], ids=["GQA", "MHA", "MQA"]
)
def test_equals_dense_forward_and_backward_over_random_packings(N, K, blocks):
    arrays = inputs(N=N, K=K)
    intervals = packed(random_packings())
    assert_close(values(arrays, intervals, *blocks), values(arrays, intervals))


def test_gradients_in_two_kernels_where_a_row_has_no_room(monkeypatch):
    monkeypatch.setattr(pallas, "MOST_ROW_BYTES", 0)
    program.cache_clear()
    arrays = inputs()
    intervals = packed(random_packings())
    assert_close(values(arrays, intervals, 16, 8), values(arrays, intervals))
    program.cache_clear()


@pytest.mark.parametrize("H", [64, 128])
def test_blocks_and_heads_as_on_a_tpu(H):
    """Blocks of 128 that do not divide the row, a document across several, an image, padding."""
    index = np.arange(300)
    start = np.where(index < 270, 0, 270)
    end = index + 1
    end[20:60] = 60
    start[290:] = end[290:] = 0
    intervals = Intervals(*(jnp.asarray(x, jnp.int32)[None] for x in (start, end)))
    arrays = inputs(1, 300, 2, 1, H)
    assert_close(values(arrays, intervals, 128, 128), values(arrays, intervals))


def test_any_intervals_over_a_longer_cache():
    arrays = inputs(3, 7, S=50)
    intervals = any_intervals((3, 7), 50)
    assert_close(values(arrays, intervals, 4, 16), values(arrays, intervals))


def test_bfloat16_accumulates_in_float32():
    arrays = inputs(dtype=jnp.bfloat16)
    intervals = packed(random_packings())
    results = values(arrays, intervals, 16, 8)
    assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
    exact = values([x.astype(jnp.float32) for x in arrays], intervals)
    assert_close(results, exact, atol=0.03, rtol=0.03)


def test_padding_gets_zeros_and_documents_do_not_leak():
    """One document's output has gradients in that document alone; padding gets 0."""
    *arrays, weight = inputs()
    document = np.zeros((ROWS, LENGTH), bool)
    document[0, 8:16] = True
    weight = jnp.where(document[:, :, None, None], weight, 0.0)
    intervals = packed(["tttIt|Itttt|ttttt"] + [""] * (ROWS - 1))
    out, *gradients = (np.asarray(x) for x in values([*arrays, weight], intervals, 16, 8))
    np.testing.assert_array_equal(out[0, 21:], 0)
    np.testing.assert_array_equal(out[1:], 0)
    for gradient in gradients:
        assert (gradient[document] != 0).any((1, 2)).all()
        np.testing.assert_array_equal(gradient[~document], 0)


def test_blocks_outside_every_interval_are_not_computed():
    """NaNs there would reach the result."""
    start = jnp.full((ROWS, LENGTH), 8, jnp.int32)
    intervals = Intervals(start, start + 8)
    q, k, v, weight = inputs()
    index = np.arange(LENGTH)
    outside = jnp.asarray((index < 8) | (index >= 16))[None, :, None, None]
    spoilt = q, jnp.where(outside, jnp.nan, k), jnp.where(outside, jnp.nan, v), weight
    expected = values((q, k, v, weight), intervals, 16, 8)
    assert_close(values(spoilt, intervals, 16, 8), expected, atol=0)


@pytest.mark.parametrize("by", ["query", "key"])
@pytest.mark.parametrize(
    "intervals", [packed(random_packings()), any_intervals((5, 36), 36)], ids=["packings", "any"]
)
def test_pairs_are_the_visible_blocks_sorted(by, intervals):
    block_q, block_k = 4, 6
    start = np.asarray(intervals.k_start_BL)
    end = np.asarray(intervals.k_end_BL)
    key = np.arange(36)
    inside = (key >= start[..., None]) & (key < end[..., None])
    inside = inside.reshape(len(start), 9, block_q, 6, block_k)
    listed = jax.jit(
        lambda *bounds: block_pairs(*visible_blocks(*bounds, block_q, block_k, 6), by=by)
    )
    table, count = listed(intervals.k_start_BL, intervals.k_end_BL)
    row, query, key, flags = (np.asarray(x)[:count] for x in table)
    pairs = list(zip(row, query, key, strict=True))
    visible = flags & VISIBLE != 0
    full = flags & FULL != 0

    def pairs_where(mask):
        return list(zip(*np.nonzero(mask), strict=True))

    def order(pair):
        return pair if by == "query" else (pair[0], pair[2], pair[1])

    some = sorted(pairs_where(inside.any((2, 4))), key=order)
    assert [pair for pair, yes in zip(pairs, visible, strict=True) if yes] == some
    every = set(pairs_where(inside.all((2, 4))))
    assert {pair for pair, yes in zip(pairs, full, strict=True) if yes} == every

    outer, inner = (query, key) if by == "query" else (key, query)
    outer_blocks = 9 if by == "query" else 6
    assert set(zip(row, outer, strict=True)) == set(np.ndindex(len(start), outer_blocks))
    new = np.diff(row * outer_blocks + outer, prepend=-1) != 0
    np.testing.assert_array_equal(flags & FIRST != 0, new)
    np.testing.assert_array_equal(flags & LAST != 0, np.append(new[1:], True))
    # A pair that computes nothing fetches nothing either, unless it opens the row.
    idle = np.flatnonzero(~visible & (np.diff(row, prepend=-1) == 0))
    np.testing.assert_array_equal(inner[idle], inner[idle - 1])


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, sequence=4)],
    ids=["heads", "positions"],
)
def test_sharded_equals_dense(mesh):
    """Rows and heads are cut without any exchange; positions with an all-gather of the keys."""
    arrays = inputs()
    intervals = packed(random_packings())
    expected = values(arrays, intervals)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp"), "sequence", "tensor")
        arrays = jax.device_put(arrays, NamedSharding(mesh, spec))
        assert_close(values(arrays, intervals, 16, 8), expected)
        lowered = program(16, 8).lower(*arrays, intervals.k_start_BL, intervals.k_end_BL)
        text = lowered.compile().as_text()
    collectives = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    exchanged = {kind for kind in collectives if kind in text}
    assert exchanged == (set() if mesh.shape["sequence"] == 1 else {"all-gather", "reduce-scatter"})


def test_rows_that_the_mesh_does_not_divide():
    arrays = inputs()
    intervals = packed(random_packings())
    expected, *_ = values(arrays, intervals)
    few = Intervals(intervals.k_start_BL[:3], intervals.k_end_BL[:3])
    function = functools.partial(attention, implementation="pallas", block=16, interpret=True)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        out = jax.jit(function)(*(x[:3] for x in arrays[:3]), few)
    assert_close(out, expected[:3])


def test_in_the_transformer_under_a_mesh(monkeypatch):
    """Loss and gradients of scanned, rematerialised layers equal those with the reference."""
    config = ModelConfig(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        mlp_width=32,
        compute_dtype="float32",
        attention="pallas",
    )
    graph, parameters = nnx.split(transformer.Transformer(config, rngs=nnx.Rngs(0)))
    intervals = packed(random_packings()[:4])
    position_BL = jnp.broadcast_to(jnp.arange(LENGTH), intervals.k_start_BL.shape)
    x_BLD = jnp.asarray(np.random.default_rng(0).standard_normal((4, LENGTH, 32), np.float32))

    def run(**changes):
        def patched(*arrays, **options):
            return attention(*arrays, **{**options, **changes})

        def loss(parameters):
            return jnp.sum(nnx.merge(graph, parameters)(x_BLD, position_BL, intervals) ** 3)

        monkeypatch.setattr(block, "attention", patched)
        return jax.jit(jax.value_and_grad(loss))(parameters)

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert_close(run(interpret=True), run(implementation="dense"), rtol=1e-4, atol=2e-4)


def abstract(B, L, N, K, H, dtype, sharding=None):
    """Shapes of q, k, v and the ends of the intervals."""
    q, k = (jax.ShapeDtypeStruct((B, L, heads, H), dtype, sharding=sharding) for heads in (N, K))
    bound = jax.ShapeDtypeStruct((B, L), jnp.int32)
    return q, k, k, bound, bound


def gradients_of(implementation="pallas", block=128):
    """The jitted gradients of attention's sum."""

    def loss(q, k, v, k_start_BL, k_end_BL):
        out = attention(
            q, k, v, Intervals(k_start_BL, k_end_BL), implementation=implementation, block=block
        )
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


@pytest.mark.parametrize(
    "platform, others", [("cpu", "chunked, dense"), ("cuda", "chunked, dense, tokamax")]
)
def test_a_platform_that_cannot_run_it_is_refused(platform, others):
    traced = gradients_of().trace(*abstract(1, 256, 2, 1, 64, jnp.float32))
    traced.lower(lowering_platforms=("tpu",))
    message = f"model.attention='pallas' runs on tpu; on {platform}: {others}$"
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=(platform,))


def test_it_is_refused_outside_jit_too():
    q, k, v, _ = inputs(1, 8, 1, 1)
    bound = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="runs on tpu; on cpu: chunked, dense"):
        attention(q, k, v, Intervals(bound, bound), implementation="pallas")


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="model.attention_block=64 must be a multiple of 128"):
        ModelConfig(attention="pallas", attention_block=64)
    with pytest.raises(ValueError, match="block_q=64 and block_k=64 must be multiples of 128"):
        gradients_of(block=64).trace(*abstract(1, 256, 2, 1, 64, jnp.float32))
    with pytest.raises(
        ValueError,
        match="65536 pairs, and there is room for 64000: take a model.attention_block above 128",
    ):
        gradients_of().trace(*abstract(64, 4096, 2, 1, 64, jnp.bfloat16))


@pytest.fixture(scope="module")
def tpu_mesh():
    """Makes a mesh of the devices of a named topology, without having any."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPU needs libtpu (pip install '.[tpu]')")

    def mesh(topology):
        devices = find_topology(topology).devices
        return make_mesh(MeshConfig(data=1, fsdp=2, tensor=-1), list(devices))

    return mesh


def compiled(mesh, *shape, dtype=jnp.bfloat16, implementation="pallas", block=512):
    """The gradients, lowered and compiled, with rows and heads cut."""
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
        lowered = gradients_of(implementation, block).lower(*abstract(*shape, dtype, sharding))
        return lowered, lowered.compile()


TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


@pytest.mark.parametrize(
    "topology, most_row_bytes, kernels",
    [*((t, pallas.MOST_ROW_BYTES, 2) for t in TOPOLOGIES), ("v5e:2x2", 0, 3)],
)
def test_mosaic_compiles_forward_and_backward(
    tpu_mesh, monkeypatch, topology, most_row_bytes, kernels
):
    """Under shard_map, with grouped heads and a length that is not a multiple of the block."""
    monkeypatch.setattr(pallas, "MOST_ROW_BYTES", most_row_bytes)
    lowered, _ = compiled(tpu_mesh(topology), 4, 1100, 4, 2, 64)
    assert lowered.as_text().count("tpu_custom_call") == kernels


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("H, block", [(64, 128), (128, 512), (128, 1024)])
def test_mosaic_compiles_at_full_length(tpu_mesh, topology, dtype, H, block):
    compiled(tpu_mesh(topology), 8, 4096, 8, 4, H, dtype=dtype, block=block)


@pytest.mark.slow
def test_memory_is_linear_in_the_row(tpu_mesh):
    """It keeps the output, lse, delta and the list of pairs; the reference keeps all scores."""

    def temporaries(implementation, length):
        _, program = compiled(
            tpu_mesh("v5e:2x2"), 4, length, 8, 8, 128, implementation=implementation
        )
        return program.memory_analysis().temp_size_in_bytes

    for length in (4096, 8192):
        assert temporaries("pallas", length) < 1.2 * (4 // 2 * length * 8 // 2 * 128 * 2)
    assert temporaries("dense", 4096) > 50 * temporaries("pallas", 4096)


def test_more_pairs_of_blocks_than_the_list_has_room_for_are_bad_input():
    def check(row_length: int, block: int = 0, fsdp: int = 64) -> None:
        experiment = Experiment(
            "long",
            model=ModelConfig(attention_block=block),
            data=DataConfig(row_length=row_length, batch_rows=128),
        )
        shape = {"data": 1, "fsdp": fsdp, "sequence": 1, "tensor": 1}
        _check_blocks(experiment, SimpleNamespace(shape=shape))

    check(4096)
    check(65536)
    with pytest.raises(ValueError, match="2 rows on a device in 256 x 256 blocks may make 131072"):
        check(131072)
    check(131072, block=1024)
    with pytest.raises(ValueError, match="128 rows .* take a model.attention_block above 1024"):
        check(131072, block=1024, fsdp=1)
