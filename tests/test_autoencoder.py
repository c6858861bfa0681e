"""The autoencoder: sizes and shapes, the quantiser against brute force, weights on disk, equality with diffusers."""

import dataclasses
import functools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx, traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from transfusion_jax.autoencoder import quantizer as q
from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.autoencoder.config import AutoencoderConfig, tiny
from transfusion_jax.autoencoder.vae import LAST_KERNEL, Gaussian, abstract_autoencoder, build
from transfusion_jax.config import MeshConfig
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding, parameter_shardings

SMALL = AutoencoderConfig(
    size=16, latent_channels=4, width=8, multipliers=(1, 2), groups=4, blocks=1, codes=32
)
VQ = dataclasses.replace(SMALL, kind="vq")


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.cache
def parameters(config: AutoencoderConfig, seed: int = 0) -> dict:
    """Random parameters, drawn by NumPy: faster than compiling a draw for every shape."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (
        rng.normal(size=shape) * (math.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.5)
    )  # noqa: E731
    abstract = nnx.to_pure_dict(abstract_autoencoder(config)[1])
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), abstract)


def run(config: AutoencoderConfig, method, *arrays):
    """`method(model, *arrays)` of the autoencoder with `parameters(config)`, compiled."""
    graph, _ = abstract_autoencoder(config)
    return jax.jit(lambda p, *arrays: method(nnx.merge(graph, p), *arrays))(
        parameters(config), *arrays
    )


def size(config: AutoencoderConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_autoencoder(config)[1]))


# The network.


def test_the_papers_autoencoder_has_86_million_parameters():
    assert abs(size(AutoencoderConfig()) - 86e6) < 0.02 * 86e6
    assert size(AutoencoderConfig()) == 85_812_715


def test_without_encoder_attention_it_is_stable_diffusions():
    stable = AutoencoderConfig(latent_channels=4, encoder_attention=False)
    assert size(stable) == 83_653_863  # Rombach et al. 2022, as published


@pytest.mark.parametrize(
    ("config", "shape"),
    [(AutoencoderConfig(), (32, 32, 8)), (tiny(), (8, 8, 4))],
    ids=["paper", "tiny"],
)
def test_latents_have_the_shape_that_is_promised(config, shape):
    graph, state = abstract_autoencoder(config)
    image = jax.ShapeDtypeStruct((2, config.size, config.size, 3), jnp.float32)
    latent = jax.eval_shape(lambda p, x: nnx.merge(graph, p).encode(x), state, image)
    assert latent.mean.shape == latent.log_variance.shape == (2, *shape)
    assert (
        jax.eval_shape(lambda p, z: nnx.merge(graph, p).decode(z), state, latent.mean).shape
        == image.shape
    )


def test_a_fresh_autoencoder_keeps_the_scale_of_what_it_sees():
    model = build(
        dataclasses.replace(SMALL, multipliers=(1, 1)), 0
    )  # one width, so that few draws are compiled
    graph, state = nnx.split(model)
    latent = jax.jit(lambda s, x: nnx.merge(graph, s).encode(x))(state, images(2, 16, 16, 3))
    image = jax.jit(lambda s, z: nnx.merge(graph, s).decode(z))(state, latent.mean)
    assert all(0.1 < float(jnp.std(x)) < 3 for x in (*latent, image))


def test_it_encodes_sizes_other_than_its_own():
    image = run(SMALL, lambda model, x: model.decode(model.encode(x).mean), images(1, 24, 10, 3))
    assert image.shape == (1, 24, 10, 3)


def test_every_parameter_matters():
    graph, _ = abstract_autoencoder(VQ)
    key = jax.random.key(0)

    def loss(p, x):
        model = nnx.merge(graph, p)
        latent = model.quantizer(model.features(x))
        return jnp.sum(model.decode(latent.latent) * jax.random.normal(key, x.shape)) + jnp.sum(
            latent.loss_B
        )

    gradients = jax.jit(jax.grad(loss))(parameters(VQ), jnp.asarray(images(2, 16, 16, 3)))
    flat = traverse_util.flatten_dict(gradients)
    # A bias of the keys adds the same to all logits of a query, which the softmax takes away.
    dead = [
        name
        for name, g in flat.items()
        if name[-2:] != ("to_k", "bias") and float(jnp.max(jnp.abs(g))) == 0
    ]
    assert not dead


def test_last_kernel_is_where_its_path_says():
    kernel = run(SMALL, lambda model: model.last_kernel[...])
    assert kernel.shape == (3, 3, 8, 3)
    np.testing.assert_array_equal(
        kernel, traverse_util.flatten_dict(parameters(SMALL))[LAST_KERNEL]
    )


def test_batch_cut_by_a_mesh_gives_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    graph, abstract = abstract_autoencoder(VQ)
    quantise = lambda model, x: model.quantizer(model.features(x))  # noqa: E731
    p, x = parameters(VQ), images(4, 16, 16, 3)
    with jax.set_mesh(mesh):
        p = jax.device_put(p, parameter_shardings(abstract, mesh))
        cut = jax.jit(lambda p, x: quantise(nnx.merge(graph, p), x))(
            p, jax.device_put(x, batch_sharding(mesh))
        )
    whole = run(VQ, quantise, x)
    assert cut.codes.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 3
    )
    np.testing.assert_array_equal(cut.codes, whole.codes)
    np.testing.assert_allclose(cut.loss_B, whole.loss_B, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 30, "multipliers": (1, 2, 4)}, "model.size=30 must be a multiple of 4"),
        ({"groups": 3}, r"model.groups=3 must divide the channels of each resolution, \(8, 16\)"),
        ({"kind": "gan"}, "model.kind='gan'"),
        ({"codes": 0}, "must be positive"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# The Gaussian.


def test_kl_of_known_gaussians():
    mean, variance = np.array([0.0, 2.0, -1.0]), np.array([1.0, 0.25, 3.0])
    element = 0.5 * (mean**2 + variance - 1 - np.log(variance))
    shape = (3, 2, 2, 5)
    whole = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32)[:, None, None, None], shape)  # noqa: E731
    kl = Gaussian(whole(mean), whole(np.log(variance))).kl()
    np.testing.assert_allclose(kl, 20 * element, rtol=1e-6, atol=1e-6)
    assert kl[0] == 0


def test_samples_have_the_gaussians_moments():
    gaussian = Gaussian(jnp.full((1, 64, 64, 8), 3.0), jnp.full((1, 64, 64, 8), math.log(0.25)))
    sample = gaussian.sample(jax.random.key(0))
    assert abs(float(jnp.mean(sample)) - 3) < 0.02
    assert abs(float(jnp.std(sample)) - 0.5) < 0.02


def test_log_variance_is_clipped():
    def encode(model, x):
        model.quant_conv.bias[...] = jnp.array([0.0] * 4 + [1e3, -1e3, 0.0, 0.0])
        return model.encode(x).log_variance

    log_variance = run(SMALL, encode, images(1, 4, 4, 3))
    assert float(jnp.max(log_variance)) == 20 and float(jnp.min(log_variance)) == -30


# The quantiser.


@pytest.mark.parametrize("n", [1, 37, 2 * q.CHUNK, 2 * q.CHUNK + 5])
def test_nearest_is_the_nearest(n):
    rng = np.random.default_rng(n)
    book, latents = (
        rng.normal(size=(n, 3)).astype(np.float32),
        rng.normal(size=(2, 5, 7, 3)).astype(np.float32),
    )
    distances = np.sum((latents[..., None, :].astype(np.float64) - book) ** 2, axis=-1)
    np.testing.assert_array_equal(
        q.nearest(jnp.asarray(latents), jnp.asarray(book)), np.argmin(distances, axis=-1)
    )


def test_of_equal_codes_the_first_is_taken():
    book = jnp.zeros((q.CHUNK + 3, 2))
    np.testing.assert_array_equal(q.nearest(jnp.ones((1, 2, 2, 2)), book), np.zeros((1, 2, 2)))


def test_gradients_pass_straight_through():
    module = q.Quantizer(16, 3, rngs=nnx.Rngs(params=0))
    latent, weight = jnp.asarray(images(2, 4, 4, 3)), jnp.asarray(images(2, 4, 4, 3, seed=1))
    out = module(latent)
    np.testing.assert_allclose(out.latent, module.lookup(out.codes), atol=1e-7)
    gradient = jax.grad(lambda z: jnp.sum(module(z).latent * weight))(latent)
    np.testing.assert_array_equal(gradient, weight)


def test_codebook_and_commitment_losses_pull_on_different_things():
    module = q.Quantizer(16, 3, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(module)
    latent = jnp.asarray(images(2, 4, 4, 3))
    loss = lambda s, z, beta: jnp.sum(nnx.merge(graph, s)(z, beta).loss_B)  # noqa: E731
    apart = latent - module.lookup(module(latent).codes)
    np.testing.assert_allclose(
        module(latent).loss_B, 1.25 * jnp.mean(apart**2, axis=(1, 2, 3)), rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(loss, 1)(state, latent, 0.25), 0.25 * 2 * apart / 48, rtol=1e-5, atol=1e-8
    )
    of_book = jax.grad(loss)(state, latent, 0.25)["codebook"][...]
    np.testing.assert_array_equal(of_book, jax.grad(loss)(state, latent, 0.0)["codebook"][...])
    expected = np.zeros((16, 3))
    np.add.at(
        expected,
        np.asarray(module(latent).codes).reshape(-1),
        np.asarray(-2 * apart / 48).reshape(-1, 3),
    )
    np.testing.assert_allclose(of_book, expected, rtol=1e-4, atol=1e-6)


def test_usage_in_closed_form():
    even = q.usage(jnp.arange(8).reshape(1, 2, 4), 16)
    np.testing.assert_allclose([even.share, even.perplexity], [0.5, 8.0], rtol=1e-6)
    one = q.usage(jnp.full((3, 2, 2), 5), 16)
    np.testing.assert_allclose([one.share, one.perplexity], [1 / 16, 1.0], rtol=1e-6)
    uneven = q.usage(jnp.array([0, 0, 0, 1]), 2)
    np.testing.assert_allclose(
        uneven.perplexity, math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rtol=1e-6
    )


def test_dead_codes_are_revived_and_live_ones_stay():
    book, latents = jnp.asarray(images(6, 3)), jnp.asarray(images(2, 4, 4, 3, seed=1)) + 10.0
    counts = q.count(jnp.array([[0, 2], [2, 5]]), 6)
    np.testing.assert_array_equal(counts, [1, 0, 2, 0, 0, 1])
    new = np.asarray(q.revive(book, latents, counts, jax.random.key(0)))
    np.testing.assert_array_equal(new[[0, 2, 5]], book[np.array([0, 2, 5])])
    rows = {tuple(row) for row in np.asarray(latents).reshape(-1, 3)}
    assert all(tuple(row) in rows for row in new[[1, 3, 4]])
    assert len({tuple(row) for row in new[[1, 3, 4]]}) > 1
    np.testing.assert_array_equal(
        q.revive(book, latents, jnp.ones(6, jnp.int32), jax.random.key(0)), book
    )


# Our own layout.


@pytest.mark.parametrize("config", [SMALL, VQ], ids=["kl", "vq"])
def test_saved_codec_comes_back(config, tmp_path):
    model = nnx.merge(abstract_autoencoder(config)[0], parameters(config, 3))
    save_codec(tmp_path / "a", config, nnx.state(model, nnx.Param), 0.5, -0.25)
    save_codec(tmp_path / "b", config, parameters(config, 3), 0.5, -0.25)
    codec = load_codec(tmp_path / "a")
    assert (codec.config, codec.scale, codec.shift) == (config, 0.5, -0.25)
    jax.tree.map(np.testing.assert_array_equal, codec.parameters, parameters(config, 3))
    for file in ("config.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "config.json",
        "weights.safetensors",
    ]
    assert codec.digest == load_codec(tmp_path / "b").digest


def test_digest_changes_with_weights_config_and_scale(tmp_path):
    save_codec(tmp_path / "a", SMALL, parameters(SMALL, 0), 1.0, 0.0)
    save_codec(tmp_path / "b", SMALL, parameters(SMALL, 1), 1.0, 0.0)
    save_codec(tmp_path / "c", SMALL, parameters(SMALL, 0), 2.0, 0.0)
    save_codec(tmp_path / "d", dataclasses.replace(SMALL, groups=2), parameters(SMALL, 0), 1.0, 0.0)
    digests = {load_codec(tmp_path / name).digest for name in "abcd"}
    assert len(digests) == 4 and all(len(d) == 64 for d in digests)


def test_codec_encodes_and_decodes(tmp_path):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    codec, x = load_codec(tmp_path), images(2, 16, 8, 3)
    mean, deviation = codec.encode(x)
    latent = run(SMALL, lambda model, x: model.encode(x), x)
    assert mean.shape == deviation.shape == (2, *codec.latent_shape(16, 8)) == (2, 8, 4, 4)
    np.testing.assert_allclose(mean, latent.mean, atol=1e-5)
    np.testing.assert_allclose(deviation, jnp.exp(latent.log_variance / 2), atol=1e-5)
    decoded = codec.decode(100 * np.asarray(mean))
    assert decoded.shape == x.shape
    assert float(jnp.max(decoded)) == 1 and float(jnp.min(decoded)) == -1


def test_vq_codec_gives_codes_without_deviation(tmp_path):
    save_codec(tmp_path, VQ, parameters(VQ), 1.0, 0.0)
    codec = load_codec(tmp_path)
    mean, deviation = codec.encode(images(2, 16, 16, 3))
    book = {tuple(row) for row in np.asarray(codec.parameters["quantizer"]["codebook"])}
    assert all(tuple(row) in book for row in np.asarray(mean).reshape(-1, 4))
    assert not np.any(deviation)


def test_sizes_that_do_not_fit_are_named(tmp_path):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    codec = load_codec(tmp_path)
    message = f"the autoencoder in {tmp_path} reduces by 2, which does not divide 15x16 pixels"
    with pytest.raises(ValueError, match=message):
        codec.latent_shape(15, 16)
    with pytest.raises(ValueError, match=message):
        codec.encode(images(1, 15, 16, 3))
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        codec.encode(images(1, 16, 16, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"kind": "gan"}, "model.kind='gan'"),
        ({"width": "eight"}, "config.json does not describe an autoencoder"),
        ({"_class_name": "VQModel"}, "_class_name='VQModel' is not 'AutoencoderKL'"),
        ({"multipliers": [1, 1]}, r"of another shape \(.* instead of .*, \.\.\.\)"),
        (
            {"multipliers": [1, 2, 4]},
            r"42 missing \(decoder.up_blocks.1.upsample.bias, .*; 10 unknown \(.*; 93 of another",
        ),
        ({"latent_projection": False}, r"4 unknown \(post_quant_conv.bias, .*quant_conv.kernel\)$"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(change, message, tmp_path):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path)


def test_what_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such directory: .*absent"):
        load_codec(tmp_path / "absent")
    with pytest.raises(ValueError, match="no config.json in .*$"):
        load_codec(tmp_path)
    save_codec(tmp_path / "vae", SMALL, parameters(SMALL), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"no config.json in .*; did you mean .*vae\?"):
        load_codec(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json does not describe an autoencoder: Expecting"):
        load_codec(tmp_path / "vae")


def test_damaged_weights_are_one_clear_error(tmp_path):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="weights.safetensors is damaged"):
        load_codec(tmp_path)
    file.rename(tmp_path / "weights.bin")
    with pytest.raises(
        ValueError, match="no weights.safetensors in .*; weights.bin cannot be read"
    ):
        load_codec(tmp_path)


# Diffusers' layout.


def published(
    channels: tuple[int, ...] = (8, 16), z: int = 4, projected: bool = True, **more
) -> tuple[dict, dict]:
    """config.json and random tensors under the names that published checkpoints of two resolutions have."""
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape):
        tensors[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) / math.sqrt(
            math.prod(shape[1:]) or 1
        )
        tensors[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32) / 10

    def block(name, inputs, outputs):
        for i, width in enumerate((inputs, outputs), 1):
            add(f"{name}.norm{i}", width)
            add(f"{name}.conv{i}", outputs, width, 3, 3)
        if inputs != outputs:
            add(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    a, b = channels
    for side, first, last, width in (("encoder", (a, 3), 2 * z, b), ("decoder", (b, z), 3, a)):
        add(f"{side}.conv_in", *first, 3, 3)
        add(f"{side}.mid_block.attentions.0.group_norm", b)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{side}.mid_block.attentions.0.{part}", b, b)
        block(f"{side}.mid_block.resnets.0", b, b)
        block(f"{side}.mid_block.resnets.1", b, b)
        add(f"{side}.conv_norm_out", width)
        add(f"{side}.conv_out", last, width, 3, 3)
    block("encoder.down_blocks.0.resnets.0", a, a)
    add("encoder.down_blocks.0.downsamplers.0.conv", a, a, 3, 3)
    block("encoder.down_blocks.1.resnets.0", a, b)
    for level, inputs, outputs in ((0, b, b), (1, b, a)):
        block(f"decoder.up_blocks.{level}.resnets.0", inputs, outputs)
        block(f"decoder.up_blocks.{level}.resnets.1", outputs, outputs)
    add("decoder.up_blocks.0.upsamplers.0.conv", b, b, 3, 3)
    if projected:
        add("quant_conv", 2 * z, 2 * z, 1, 1)
        add("post_quant_conv", z, z, 1, 1)
    config = {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1", "act_fn": "silu", "in_channels": 3,
        "out_channels": 3, "latent_channels": z, "block_out_channels": list(channels), "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4, "sample_size": 16, "force_upcast": True,
    }  # fmt: skip
    if not projected:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config | more, tensors


def publish(directory, config: dict, tensors: dict, variant: str = ""):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        tensors, directory / f"diffusion_pytorch_model{variant}.safetensors"
    )
    return directory


def test_published_codec_saved_as_ours_is_the_same(tmp_path):
    config, tensors = published(scaling_factor=0.3611, shift_factor=0.1159)
    codec = load_codec(publish(tmp_path / "theirs", config, tensors))
    save_codec(tmp_path / "ours", codec.config, codec.parameters, codec.scale, codec.shift)
    again, x = load_codec(tmp_path / "ours"), images(1, 16, 16, 3)
    assert again.digest == codec.digest
    np.testing.assert_array_equal(again.encode(x)[0], codec.encode(x)[0])


def test_old_names_and_convolutions_of_attention_load_the_same(tmp_path):
    config, tensors = published()
    new = load_codec(publish(tmp_path / "new", config, tensors))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for ours, old in names.items():
        renamed = {
            k.replace(f"attentions.0.{ours}.", f"attentions.0.{old}."): v
            for k, v in renamed.items()
        }
    assert renamed.keys() != tensors.keys()
    assert load_codec(publish(tmp_path / "old", config, renamed)).digest == new.digest
    square = {
        k: v[:, :, None, None] if "attentions" in k and v.ndim == 2 else v
        for k, v in tensors.items()
    }
    assert load_codec(publish(tmp_path / "square", config, square)).digest == new.digest


def test_half_precision_files_load(tmp_path):
    config, tensors = published()
    full = load_codec(publish(tmp_path / "full", config, tensors))
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    halved = load_codec(publish(tmp_path / "half", config, half, ".fp16"))
    brain = load_codec(
        publish(tmp_path / "brain", config, {k: v.astype(jnp.bfloat16) for k, v in tensors.items()})
    )
    for codec, bits in ((halved, 11), (brain, 8)):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(codec.parameters))
        jax.tree.map(
            lambda a, b, bits=bits: np.testing.assert_allclose(a, b, rtol=2.0**-bits, atol=1e-6),
            codec.parameters,
            full.parameters,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]},
            "down_block_types has 'AttnDownEnc",
        ),
        (
            {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
            "up_block_types has 'AttnUpDecoderBlock2D'",
        ),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "differ in length"),
        ({"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' is not 'AutoencoderKL'"),
        ({"act_fn": "relu"}, "act_fn='relu' is not 'silu'"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean=\[.*\] is not supported"),
        ({"out_channels": 4}, "in_channels=3 and out_channels=4 differ"),
        ({"use_quant_conv": False}, "use_quant_conv=False and use_post_quant_conv=True differ"),
        ({"norm_num_groups": 3}, "groups=3 must divide"),
    ],
)
def test_published_configs_that_cannot_be_read_are_named(change, message, tmp_path):
    config, tensors = published()
    with pytest.raises(ValueError, match=message):
        load_codec(publish(tmp_path / "x", config | change, tensors))


def test_tensors_that_do_not_fit_are_named_as_in_the_file(tmp_path):
    config, tensors = published()
    kept = {k: v for k, v in tensors.items() if "to_q" not in k and "mid_block.resnets" not in k}
    kept |= {
        "loss.logvar": np.zeros(1, np.float32),
        "decoder.conv_in.weight": np.zeros((16, 5, 3, 3), np.float32),
    }
    with pytest.raises(ValueError) as error:
        load_codec(publish(tmp_path / "x", config, kept))
    assert (
        "36 missing (decoder.mid_block.attentions.0.to_q.bias, decoder.mid_block.attentions.0.to_q"
        in str(error.value)
    )
    assert "1 unknown (loss.logvar)" in str(error.value)
    assert (
        "1 of another shape (decoder.conv_in.weight (16, 5, 3, 3) instead of (16, 4, 3, 3))"
        in str(error.value)
    )


def test_bin_instead_of_safetensors_is_named(tmp_path):
    publish(tmp_path / "x", *published())
    (tmp_path / "x" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "x" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        ValueError, match="no diffusion_pytorch_model.safetensors in .*model.bin cannot be read"
    ):
        load_codec(tmp_path / "x")


# Narrow ones of the published architectures: what varies between them, and the depth of the first.
ARCHITECTURES = {
    "stable_diffusion_1": {
        "block_out_channels": (8, 16, 24, 24), "layers_per_block": 2, "sample_size": 512, "scaling_factor": 0.18215,
    },
    "stable_diffusion_xl": {"block_out_channels": (8, 16), "sample_size": 1024, "scaling_factor": 0.13025},
    "stable_diffusion_3": {
        "block_out_channels": (8, 16), "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": 1.5305, "shift_factor": 0.0609,
    },
    "flux": {
        "block_out_channels": (16, 32), "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "layers_per_block": 2,
    },
    "no_middle_attention": {"block_out_channels": (8, 12), "mid_block_add_attention": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def oracle():
    """torch and diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports say
        reason = "torch and diffusers are not installed: their autoencoder is not here to be compared with"
        return pytest.importorskip("torch", reason=reason), pytest.importorskip(
            "diffusers", reason=reason
        )


def diffusers_autoencoder(oracle, **config):
    """Diffusers' own, with every weight random."""
    torch, diffusers = oracle
    levels = len(config["block_out_channels"])
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4, **config,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        scale = math.prod(weight.shape[1:]) ** -0.5 if weight.ndim > 1 else 0.3
        weight.data = scale * torch.randn(weight.shape, generator=generator) + (
            0.5 if weight.ndim == 1 else 0.0
        )
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_codec_equals_diffusers(name, oracle, tmp_path):
    torch, _ = oracle
    config = ARCHITECTURES[name]
    theirs = diffusers_autoencoder(oracle, **config)
    theirs.save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert codec.scale == config.get("scaling_factor", 0.18215)
    assert codec.shift == config.get("shift_factor", 0.0)

    x = images(2, 16, 24, 3)
    channels_last = lambda tensor: tensor.numpy().transpose(0, 2, 3, 1)  # noqa: E731
    with torch.no_grad():
        expected = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
        mean, deviation = channels_last(expected.mean), channels_last(expected.std)
        decoded = channels_last(theirs.decode(expected.mean).sample.clip(-1, 1))
    assert (
        min(mean.std(), deviation.std(), decoded.std()) > 0.1
    )  # so that the tolerance means something
    ours = codec.encode(x)
    np.testing.assert_allclose(ours[0], mean, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[1], deviation, atol=1e-4, rtol=0)
    np.testing.assert_allclose(codec.decode(mean), decoded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("projected", [True, False])
def test_the_names_of_this_file_are_diffusers(projected, oracle):
    config, tensors = published(projected=projected)
    fields = (
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "use_quant_conv",
        "use_post_quant_conv",
    )
    theirs = diffusers_autoencoder(
        oracle, **{name: config[name] for name in fields if name in config}
    ).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        k: v.shape for k, v in tensors.items()
    }
