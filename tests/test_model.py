import functools
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from transfusion_jax.config import TABLE_2, Experiment, ImageConfig, ModelConfig, RopeScaling
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.build import abstract_model, build
from transfusion_jax.model.layers import product
from transfusion_jax.model.patches.grid import patchify, unpatchify
from transfusion_jax.model.patches.linear import LinearPatches
from transfusion_jax.model.patches.timestep import sinusoid
from transfusion_jax.model.patches.unet import UNetPatches
from transfusion_jax.model.rope import rotate, rotation
from transfusion_jax.model.transformer import KVCache

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@functools.cache
def model(attention: str = "chunked", remat: str = "none", layer_loop: str = "scan"):
    config = ModelConfig(
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        vocab_size=32,
        compute_dtype="float32",
        attention=attention,
        attention_block=16,
        remat=remat,
        layer_loop=layer_loop,
    )
    built = build(Experiment("test", image=ImageConfig(4, 4, 1, 2), model=config), 0)
    # Fresh output layers predict zero; random ones, so that every path carries a signal.
    built.patches.out_DZ[...] = jax.random.normal(jax.random.key(1), built.patches.out_DZ.shape)
    return built


def rows(*names: str):
    return jax.tree.map(jnp.asarray, packings.batch([packings.PACKINGS[n] for n in names]))


def timesteps(batch):
    return jnp.asarray(
        np.random.default_rng(0).integers(0, 1000, batch.image_start_BM.shape), jnp.int32
    )


@pytest.mark.parametrize(
    "name", ["documents with images", "several images", "image at both ends", "padding"]
)
def test_gradients_reach_exactly_the_visible_positions(name):
    """d hidden_i / d input_j is zero where i may not see j, and not zero where it may."""
    batch = rows(name)
    net = model()
    x_BLD = jax.random.normal(jax.random.key(2), (1, packings.LENGTH, 32))
    intervals = row_intervals(batch, packings.P)
    jacobian = jax.jit(
        jax.jacrev(lambda x: net.transformer(x, batch.position_BL, intervals)[0].sum(-1))
    )(x_BLD)
    reached = np.abs(np.asarray(jacobian))[:, 0].sum(-1) > 0
    seen = packings.mask(packings.PACKINGS[name])
    np.testing.assert_array_equal(
        reached, seen | np.eye(packings.LENGTH, dtype=bool)
    )  # padding has its residual


def test_every_patch_of_an_image_sees_all_of_it_and_no_later_image():
    batch, net = rows("several images"), model()
    t = timesteps(batch)

    def prediction(latents, slot):
        return net(batch, latents, t)[1][0, slot].sum()

    for slot in range(3):
        gradient = jax.jit(jax.grad(prediction), static_argnums=1)(batch.latents_BMhwc, slot)[0]
        touched = np.abs(np.asarray(gradient)).reshape(packings.SLOTS, -1) > 0
        assert touched[: slot + 1].all() and not touched[slot + 1 :].any()


def test_packed_equals_unpacked():
    """Every document's hidden states, logits and noise predictions are the same alone and among
    others."""
    packing, net = packings.PACKINGS["documents with images"], model()
    packed = rows("documents with images")
    t = timesteps(packed)
    hidden, predicted = net(packed, packed.latents_BMhwc, t)
    logits, at, slot = net.logits(hidden), 0, 0
    for document in packing.split("|"):
        alone = jax.tree.map(jnp.asarray, packings.batch([document]))
        length, images = len(document) + (packings.P - 1) * document.count("I"), document.count("I")
        here, slots = slice(at, at + length), slice(slot, slot + images)
        tokens = jnp.pad(packed.tokens_BL[:, here], ((0, 0), (0, packings.LENGTH - length)))
        latents = (
            jnp.zeros_like(alone.latents_BMhwc).at[:, :images].set(packed.latents_BMhwc[:, slots])
        )
        t_alone = jnp.zeros_like(t).at[:, :images].set(t[:, slots])
        alone = replace(alone, tokens_BL=tokens, latents_BMhwc=latents)
        hidden_alone, predicted_alone = net(alone, latents, t_alone)
        np.testing.assert_allclose(net.logits(hidden_alone)[:, :length], logits[:, here], atol=1e-5)
        np.testing.assert_allclose(predicted_alone[:, :images], predicted[:, slots], atol=1e-5)
        at, slot = at + length, slot + images
    assert slot == packing.count("I")


@pytest.mark.parametrize(
    "variant",
    [
        ("dense", "none"),
        ("chunked", "full"),
        ("chunked", "minimal"),
        ("chunked", "attention"),
        ("chunked", "minimal", "unroll"),
    ],
)
def test_attention_remat_and_loop_do_not_change_the_model(variant):
    batch = rows(*packings.PACKINGS)
    t = timesteps(batch)

    def gradient(net):
        graph, parameters = nnx.split(net, nnx.Param)

        def loss(parameters):
            hidden, predicted = nnx.merge(graph, parameters)(batch, batch.latents_BMhwc, t)
            return jnp.mean(jnp.sin(hidden)) + jnp.mean(predicted**2)

        return jax.jit(jax.grad(loss))(nnx.to_pure_dict(parameters))

    for got, expected in zip(
        *(jax.tree.leaves(gradient(net)) for net in (model(*variant), model())), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunks", [[36], [5, 1, 1, 29], [1, 1, 1, 33]])
def test_cached_equals_uncached(chunks):
    """A row run piece by piece over a cache gives the hidden states of the row run at once."""
    net = model()
    x_BLD = jax.random.normal(jax.random.key(3), (2, 36, 32))
    position = jnp.broadcast_to(jnp.arange(36, dtype=jnp.int32), (2, 36))
    causal = Intervals(jnp.zeros_like(position), position + 1)
    expected = net.transformer(x_BLD, position, causal)
    cache, at, pieces = KVCache.zeros(net.config, 2, 40), 0, []
    for length in chunks:
        here = slice(at, at + length)
        intervals = Intervals(causal.k_start_BL[:, here], causal.k_end_BL[:, here])
        start = jnp.full((2,), at, jnp.int32)
        hidden, cache = net.transformer.extend(
            x_BLD[:, here], position[:, here], intervals, cache, start
        )
        pieces.append(hidden)
        at += length
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, atol=1e-5)


def test_patches_run_left_to_right_top_to_bottom():
    image = jnp.arange(16).reshape(4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(patchify(image, 2), expected)
    latents = jax.random.normal(jax.random.key(0), (2, 3, 8, 4, 5))
    np.testing.assert_array_equal(unpatchify(patchify(latents, 2), (8, 4, 5), 2), latents)


def test_rope_turns_pairs_by_the_angles_of_llama():
    """x_i + j x_{i + H/2} is multiplied with exp(j p theta^(-2i/H))."""
    H, theta = 16, 10_000.0
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, H))
    position = jnp.asarray([[0, 1, 2, 17, 900], [4, 3, 2, 1, 0]], jnp.int32)
    pairs = np.asarray(x[..., : H // 2]) + 1j * np.asarray(x[..., H // 2 :])
    angle = np.asarray(position)[..., None, None] * theta ** (-2 * np.arange(H // 2) / H)
    turned = pairs * np.exp(1j * angle)
    got = rotate(x, *rotation(position, H, theta, RopeScaling()))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-4)


def test_rope_of_bfloat16_rounds_once():
    """As in float32, then rounded."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16)).astype(jnp.bfloat16)
    turns = rotation(jnp.arange(10, dtype=jnp.int32).reshape(2, 5), 16, 100.0, RopeScaling())
    got = rotate(x, *turns)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotate(x.astype(jnp.float32), *turns).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("kind", "timestep"), [("linear", "before"), ("linear", "after"), ("unet", "before")]
)
def test_gradients_of_what_is_added_everywhere_are_sums_in_float32(kind, timestep):
    """Biases, positions and timesteps: in bfloat16 their sums over images would stall."""
    image, images = ImageConfig(16, 16, 2, 4), 96
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=(4, images // 4, *image.shape)), jnp.float32)
    t = jnp.asarray(rng.integers(0, 1000, (4, images // 4)), jnp.int32)
    # With a mean, or the sums would be about zero, and the error of any a large part of them.
    cotangent = jnp.asarray(rng.normal(1.0, 1.0, (4, images // 4, image.patches, 16)), jnp.float32)

    def gradients(dtype: str) -> dict:
        config = ModelConfig(
            width=16, heads=2, compute_dtype=dtype, patch_position="learned", timestep=timestep,
            patch_encoder=kind, unet_widths=(8, 8, 8) if kind == "unet" else (),
            unet_blocks=1 if kind == "unet" else 2,
        )  # fmt: skip
        encoder = {"linear": LinearPatches, "unet": UNetPatches}[kind]
        graph, state = nnx.split(encoder(config, image, rngs=nnx.Rngs(params=0)))

        def product(state):
            vectors, _ = nnx.merge(graph, state).encode(pixels, t)
            return jnp.sum(vectors.astype(jnp.float32) * cotangent)

        found = nnx.to_flat_state(jax.jit(jax.grad(product))(state))
        return {path: np.asarray(x[...]) for path, x in found}

    exact, rounded = gradients("float32"), gradients("bfloat16")
    added = [path for path in exact if {"bias", "position_PD"} & {*path} or "time" in path[-1]]
    assert len(added) > 2
    for path in added:
        if size := np.linalg.norm(exact[path]):
            error = np.linalg.norm(rounded[path] - exact[path]) / size
            assert error < 0.012, (path, error)


@pytest.mark.parametrize(("platform", "dimensions"), [("cpu", 2), ("cuda", 2), ("tpu", 3)])
def test_products_keep_their_dimensions_on_tpus(platform, dimensions):
    """There flattening costs copies; elsewhere flat products are faster. Either gives the same."""
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    x, kernel = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 8), (8, 3, 4)])
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(product)(x, kernel)
    (dot,) = (e for e in traced.eqns if e.primitive.name == "dot_general")
    assert dot.invars[0].aval.ndim == dimensions
    (got,) = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, x, kernel)
    np.testing.assert_allclose(got, np.einsum("bld,dnh->blnh", x, kernel), atol=1e-5)


def test_attention_depends_on_distances_alone():
    """Moving a row along leaves its hidden states alone; moving a part of it does not. So queries
    and keys are turned, both by the same angles."""
    net = model()
    x_BLD = jax.random.normal(jax.random.key(3), (1, 12, 32))
    position = jnp.arange(12, dtype=jnp.int32)[None]
    all_of_it = Intervals(jnp.zeros_like(position), jnp.full_like(position, 12))
    run = jax.jit(lambda position: net.transformer(x_BLD, position, all_of_it))
    hidden = run(position)
    np.testing.assert_allclose(run(position + 57), hidden, atol=1e-4)
    parted = jnp.where(position < 6, position, position + 5)
    assert np.abs(run(parted) - hidden).max() > 0.01


def test_timesteps_are_waves_of_known_frequencies():
    """cos and sin of t * 0.1 * 10,000^(-i / 128): the slowest turns a thousandth of a circle in
    1,000 steps."""
    t = jnp.asarray([[0, 1, 31, 999]], jnp.int32)
    angle = np.asarray(t)[..., None] * 0.1 * 10_000.0 ** (-np.arange(128) / 128)
    waves = sinusoid(t)
    np.testing.assert_allclose(waves[..., :128], np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(waves[..., 128:], np.sin(angle), atol=1e-4)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_linear_patches_are_their_equations(where, position):
    """In numpy, from the docstring and section 3.2, at timesteps in 0..999."""
    config = ModelConfig(
        width=32, heads=4, compute_dtype="float32", timestep=where, patch_position=position
    )
    patches = LinearPatches(config, ImageConfig(4, 4, 1, 2), rngs=nnx.Rngs(params=0))
    images = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 1))
    t = jnp.asarray([[0, 5, 50], [300, 700, 999]], jnp.int32)
    weights = {
        name: np.asarray(x[...], np.float64)
        for name, x in vars(patches).items()
        if isinstance(x, nnx.Param)
    }

    def silu(x):
        return x / (1 + np.exp(-x))

    angle = np.asarray(t)[..., None] * 0.1 * 10_000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    time = silu(waves @ weights["time_in"]) @ weights["time_out_DD"]
    values = np.asarray(patchify(images, 2))
    if where == "before":
        time = silu(time) @ weights["time_patch_DZ"]
        expected = (values + time[:, :, None]) @ weights["in_ZD"]
    else:
        expected = values @ weights["in_ZD"] + time[:, :, None]
    if position == "learned":
        expected = expected + weights["position_PD"]
    vectors, carried = patches.encode(images, t)
    assert carried is None
    np.testing.assert_allclose(vectors, expected, atol=1e-4)


def test_parameters_have_the_names_of_earlier_checkpoints():
    """Other names would make checkpoints unreadable."""
    config = ModelConfig(layers=2, width=32, heads=4, patch_position="learned")
    tree = nnx.to_pure_dict(abstract_model(Experiment("test", model=config))[1])
    names = {".".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)}
    attention = {f"attention.{name}" for name in ("q_DNH", "k_DKH", "v_DKH", "out_NHD")}
    mlp = {f"mlp.{name}" for name in ("gate_DF", "up_DF", "down_FD")}
    blocks = attention | mlp | {"attention_norm.scale", "mlp_norm.scale"}
    layers = ("time_in", "time_out_DD", "time_patch_DZ", "position_PD", "in_ZD", "out_DZ")
    assert names == (
        {"embedding_VD", "output_DV", "transformer.norm.scale"}
        | {f"transformer.blocks.{name}" for name in blocks}
        | {f"patches.{name}" for name in layers}
    )


@pytest.mark.parametrize("size", TABLE_2)
def test_presets_have_the_sizes_of_table_2(size):
    """Parameters within 4 % of the name, and table 7's share of the linear patch layers."""
    path = EXPERIMENTS / f"transfusion_{size.replace('.', '_').lower()}.py"
    experiment = runpy.run_path(str(path))["config"]()
    _, parameters = abstract_model(experiment)
    tree = nnx.to_pure_dict(parameters)
    total = sum(x.size for x in jax.tree.leaves(tree))
    patches = sum(x.size for x in jax.tree.leaves(tree["patches"]))
    assert total / 1e9 == pytest.approx(float(size[:-1]), rel=0.04)
    share = {"0.16B": 0.5, "0.37B": 0.4, "0.76B": 0.4, "1.4B": 0.4, "7B": 0.3}[size]
    assert round(100 * patches / (total - patches), 1) == share
