import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transfusion_jax.planning.program import Program, read_program
from transfusion_jax.planning.topology import find_topology


def text(function, *arrays) -> str:
    """The compiled program of a function."""
    return jax.jit(function).lower(*arrays).compile().as_text()


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def sharded(mesh, spec, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def by_kind(program: Program) -> dict[str, tuple[float, float, set]]:
    """Bytes that a device sends in one run, how often, and groups."""
    kinds = {}
    for c in program.collectives:
        sent, times, groups = kinds.get(c.kind, (0, 0, set()))
        kinds[c.kind] = sent + c.bytes_sent * c.times, times + c.times, groups | {c.group}
    return kinds


def nested(x, w):
    """A scan of 5 steps, each a scan of 3 products; the outer one stacks its carries."""

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], x

    return jax.lax.scan(outer, x, w)


NESTED = f32(8, 16), f32(5, 16, 16)
NESTED_FLOPS = 5 * 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    "equation, shapes, multiplied",
    [
        ("ij,jk->ik", [(8, 16), (16, 32)], 8 * 16 * 32),
        ("ij,kj->ki", [(8, 16), (32, 16)], 8 * 16 * 32),
        ("bij,bkj->bki", [(4, 8, 16), (4, 32, 16)], 4 * 8 * 16 * 32),
        ("blkgh,bskh->bkgls", [(2, 8, 3, 2, 16), (2, 24, 3, 16)], 2 * 8 * 3 * 2 * 16 * 24),
    ],
)
def test_a_product_takes_two_operations_per_multiplication(equation, shapes, multiplied):
    arrays = (f32(*shape) for shape in shapes)
    program = read_program(text(functools.partial(jnp.einsum, equation), *arrays))
    assert program.flops == 2 * multiplied
    assert program.collectives == () and program.kernels == {}


@pytest.mark.parametrize(
    "window",
    [
        dict(padding="VALID", window_strides=(2, 1)),
        dict(
            padding=[(2, 1), (3, 0)],
            window_strides=(2, 3),
            lhs_dilation=(2, 1),
            rhs_dilation=(1, 2),
        ),
        dict(padding="SAME", window_strides=(1, 1), feature_group_count=2),
        dict(padding="SAME", window_strides=(1, 1), batch_group_count=2),
    ],
)
def test_a_convolution_multiplies_neither_padding_nor_holes(window):
    convolution = functools.partial(jax.lax.conv_general_dilated, **window)
    x = jnp.ones((4, 6, 9, 8))
    kernel = jnp.ones((10, 6 // window.get("feature_group_count", 1), 3, 2))
    # On ones, every element of the result counts the products that are summed into it.
    products = float(convolution(x, kernel).sum())
    assert read_program(text(convolution, x, kernel)).flops == 2 * products


@pytest.mark.parametrize("written", [True, False], ids=["count written", "count found"])
def test_nested_loops_multiply(written):
    program = text(nested, *NESTED)
    assert program.count("known_trip_count") == 2
    if not written:
        program = program.replace("known_trip_count", "")
    assert read_program(program).flops == NESTED_FLOPS


def test_a_loop_may_start_and_step_anywhere():
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 4, c[1] @ c[1]), (3, x))

    program = text(loop, f32(8, 8)).replace("known_trip_count", "")
    assert read_program(program, unknown_trips=0).flops == 2 * 2 * 8**3


@pytest.mark.parametrize(
    "condition",
    [lambda i, x: i < 10, lambda i, x: x.sum() < 10, lambda i, x: (i < 10) & (x.sum() < 10)],
    ids=["start", "end", "both"],
)
def test_a_loop_that_depends_on_data_counts_as_told(condition):
    def loop(i, x):
        return jax.lax.while_loop(
            lambda carry: condition(*carry), lambda c: (c[0] + 1, c[1] @ c[1]), (i, x)
        )

    program = text(loop, INDEX, f32(8, 8))
    assert read_program(program).flops == 2 * 8**3
    assert read_program(program, unknown_trips=7.5).flops == 7.5 * 2 * 8**3


def test_each_branch_counts_as_told():
    def branch(i, x):
        return jax.lax.switch(i, [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x], x)

    program = text(branch, INDEX, f32(8, 8))
    assert read_program(program).flops == 3 * 2 * 8**3
    assert read_program(program, taken=0.5).flops == 3 * 8**3


# Kind: the function of a float32[64] on each device of a 2x4 mesh, bytes that a device sends, group
# of the first device.
COLLECTIVES = {
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "b", tiled=True).reshape(4, 64)[0],
        3 * 256,
        (0, 1, 2, 3),
    ),
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), 2 * 256 / 2, (0, 4)),
    "reduce-scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), 4),
        256 * 3 / 4,
        (0, 1, 2, 3),
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x.reshape(8, 8), ("a", "b"), 0, 0).reshape(64),
        256 * 7 / 8,
        tuple(range(8)),
    ),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "a", [(1, 0)]), 256, (4, 0)),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_in_a_loop(kind):
    collective, sent, group = COLLECTIVES[kind]
    mesh = jax.make_mesh((2, 4), ("a", "b"))

    @functools.partial(jax.shard_map, mesh=mesh, out_specs=P(("a", "b")), check_vma=False)
    def loop(x):
        return jax.lax.scan(lambda x, _: (collective(jnp.sin(x)), None), x, None, length=6)[0]

    program = read_program(text(loop, sharded(mesh, P(("a", "b")), 512)))
    assert by_kind(program) == {kind: (6 * sent, 6, {group})}


@pytest.mark.parametrize(
    "groups, first",
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'b','a'}", (0, 4, 1, 5, 2, 6, 3, 7)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'a'}", (3, 2)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
    ],
)
def test_groups_are_read_in_every_form(groups, first):
    program = f"""HloModule sum

ENTRY %main (x: bf16[6]) -> bf16[6] {{
  %x = bf16[6]{{0:T(256)}} parameter(0)
  ROOT %sum = bf16[6]{{0:T(256)}} all-reduce(%x), channel_id=1, replica_groups={groups}, \
to_apply=%add
}}
"""
    (collective,) = read_program(program).collectives
    assert collective.group == first
    assert collective.bytes_sent == 2 * 12 * (len(first) - 1) / len(first)


def test_a_loop_reads_and_writes_slices():
    layers = 200
    layer_bytes = 4 * 16 * 16

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w)

    program = read_program(text(scanned, f32(16, 16), f32(layers, 16, 16)))
    # The weights are read and the results written; each array may also be copied a few times.
    assert 2 * layers * layer_bytes < program.hbm_bytes < 20 * layers * layer_bytes


def test_memory_of_a_product():
    program = read_program(text(jnp.matmul, f32(8, 16), f32(16, 32)))
    assert program.hbm_bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)


def test_only_main_memory_counts():
    """A copy to on-chip memory, a product there, and a result written back."""
    program = """HloModule negative

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  %twice = f32[1024]{0:T(1024)S(1)} add(%done, %done)
  ROOT %negative = f32[1024]{0:T(1024)} negate(%twice)
}
"""
    assert read_program(program).hbm_bytes == 2 * 4096


def test_a_fusion_reads_what_it_needs():
    """A quarter of the stack that it pads and slices; all of what an inner fusion passes on."""
    program = """HloModule product

%turned (w: f32[64,32]) -> f32[32,64] {
  %w = f32[64,32]{1,0} parameter(0)
  ROOT %turned_w = f32[32,64]{0,1} bitcast(%w)
}

%sliced (stack: f32[4,8,32], index: s32[], weight: f32[64,32]) -> f32[1,8,64] {
  %stack = f32[4,8,32]{2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %padded = f32[5,8,32]{2,1,0} pad(%stack, %zero), padding=0_1x0_0x0_0
  %index = s32[] parameter(1)
  %first = s32[] constant(0)
  %slice = f32[1,8,32]{2,1,0} dynamic-slice(%padded, %index, %first, %first), \
dynamic_slice_sizes={1,8,32}
  %weight = f32[64,32]{1,0} parameter(2)
  %turn = f32[32,64]{0,1} fusion(%weight), kind=kLoop, calls=%turned
  ROOT %product = f32[1,8,64]{2,1,0} dot(%slice, %turn), lhs_contracting_dims={2}, \
rhs_contracting_dims={0}
}

ENTRY %main (stacked: f32[4,8,32], at: s32[], by: f32[64,32]) -> f32[1,8,64] {
  %stacked = f32[4,8,32]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %by = f32[64,32]{1,0} parameter(2)
  ROOT %layer = f32[1,8,64]{2,1,0} fusion(%stacked, %at, %by), kind=kOutput, calls=%sliced
}
"""
    flops = 2 * 8 * 32 * 64
    hbm_bytes = 4 * (8 * 32 + 1 + 64 * 32 + 8 * 64)
    assert read_program(program) == Program(flops, hbm_bytes, (), {})


def test_an_instruction_may_take_several_lines():
    """As those of kernels with metadata do."""
    program = """ENTRY %main (x: f32[8,4], y: f32[4,2]) -> f32[8,2] {
  %x = f32[8,4]{1,0} parameter(0), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="x"}
  %y = f32[4,2]{1,0} parameter(1)
  ROOT %z = f32[8,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert read_program(program).flops == 2 * 8 * 4 * 2


@pytest.fixture(scope="module")
def tpu_mesh() -> Mesh:
    """A 2x2 mesh of TPUs, without having any."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPU needs libtpu (pip install '.[tpu]')")
    devices = find_topology("v5e:2x2").devices
    return jax.make_mesh((2, 2), ("a", "b"), devices=devices)


def test_products_on_a_tpu(tpu_mesh):
    """They become convolutions, and a batch a window that slides over padding."""

    def products(a, b, c):
        return (
            jnp.einsum("bij,bkj->bki", a, b),
            jnp.einsum("bij,bkj->ikj", a, b),
            jnp.einsum("bij,jk->kbi", a, c),
        )

    arrays = (sharded(tpu_mesh, P(), *shape) for shape in [(6, 128, 256), (6, 64, 256), (256, 512)])
    program = text(products, *arrays)
    assert "convolution(" in program and " dot(" not in program
    assert read_program(program).flops == 2 * 6 * 128 * 256 * (64 + 64 + 512)


def test_a_kernel_in_a_loop_on_a_tpu(tpu_mesh):
    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    @functools.partial(jax.shard_map, mesh=tpu_mesh, out_specs=P(), check_vma=False)
    def loop(x):
        kernel = pl.pallas_call(double, out_shape=f32(8, 128), name="double")
        return jax.lax.scan(lambda x, _: (kernel(x), None), x, None, length=5)[0]

    assert read_program(text(loop, sharded(tpu_mesh, P(), 8, 128))).kernels == {"double": 5}


@pytest.fixture(scope="module")
def tpu_gradient(tpu_mesh) -> str:
    """The gradient of six scanned layers with weights cut over two and over four devices.

    The backward pass gathers the weights again.
    """
    along = P(None, "b")
    across = P(None, ("a", "b"))

    def loss(weights, x):
        def layer(x, weights):
            first = jax.lax.all_gather(weights[0], "b", tiled=True)
            second = jax.lax.all_gather(weights[1], ("a", "b"), tiled=True)
            return jnp.tanh(jnp.tanh(x @ first) @ second.T), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        return jax.lax.pmean(jnp.sum(x.astype(jnp.float32)), ("a", "b"))

    gradient = jax.shard_map(jax.grad(loss), mesh=tpu_mesh, out_specs=(along, across))
    weights = tuple(
        sharded(tpu_mesh, spec, 6, 1024, 4096, dtype=jnp.bfloat16) for spec in (along, across)
    )
    x = sharded(tpu_mesh, P(("a", "b")), 4096, 1024, dtype=jnp.bfloat16)
    return text(gradient, weights, x)


def test_a_scanned_gradient_on_a_tpu(tpu_gradient):
    program = read_program(tpu_gradient)
    weight = 1024 * 4096
    # Two products per layer, each forward, recomputed, and backward to the input and to the weight;
    # 1,024 rows per device.
    assert program.flops == pytest.approx(6 * 2 * 4 * 2 * 1024 * weight, rel=0.01)
    stacks = 6 * 2 * weight * (1 / 2 + 1 / 4)
    # The weights are read and the gradients written, a layer at a time, not all in each iteration.
    assert 2 * stacks < program.hbm_bytes < 6 * stacks


def test_collectives_on_a_tpu(tpu_gradient):
    assert "AsyncCollectiveStart" in tpu_gradient  # which spreads a gather over several fusions
    kinds = by_kind(read_program(tpu_gradient))
    sent, times, groups = kinds["all-gather"]
    assert sent == 6 * 2 * 1024 * 4096 * 2 * (1 / 2 + 3 / 4) and times == 6 * 2 * 2
    assert groups == {(0, 1), (0, 1, 2, 3)}
    sent, times, _ = kinds["reduce-scatter"]
    assert sent == pytest.approx(6 * 1024 * 4096 * 2 * (1 / 2 + 3 / 4), rel=0.1) and times == 6 * 2
