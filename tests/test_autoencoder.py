"""The autoencoder: sizes and shapes, the quantiser against brute force, files, and diffusers."""

import dataclasses
import functools
import json
import math
import os
import warnings
from pathlib import Path

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
    """Random parameters, drawn with NumPy because JAX would compile a draw for every shape."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)

    _, abstract = abstract_autoencoder(config)
    return jax.tree.map(draw, nnx.to_pure_dict(abstract))


def run(config: AutoencoderConfig, method, *arrays):
    """`method(model, *arrays)` of the autoencoder with `parameters(config)`, compiled."""
    graph, _ = abstract_autoencoder(config)

    @jax.jit
    def compiled(p, *arrays):
        return method(nnx.merge(graph, p), *arrays)

    return compiled(parameters(config), *arrays)


def size(config: AutoencoderConfig) -> int:
    """Number of parameters."""
    _, abstract = abstract_autoencoder(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


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
def test_shapes_of_latents_and_reconstructions(config, shape):
    graph, state = abstract_autoencoder(config)
    image = jax.ShapeDtypeStruct((2, config.size, config.size, 3), jnp.float32)
    latent = jax.eval_shape(lambda p, x: nnx.merge(graph, p).encode(x), state, image)
    decoded = jax.eval_shape(lambda p, z: nnx.merge(graph, p).decode(z), state, latent.mean)
    assert latent.mean.shape == latent.log_variance.shape == (2, *shape)
    assert decoded.shape == image.shape


def test_initialisation_preserves_scale():
    # A single width means few shapes, hence few compiled draws.
    model = build(dataclasses.replace(SMALL, multipliers=(1, 1)), 0)
    graph, state = nnx.split(model)
    latent = jax.jit(lambda s, x: nnx.merge(graph, s).encode(x))(state, images(2, 16, 16, 3))
    image = jax.jit(lambda s, z: nnx.merge(graph, s).decode(z))(state, latent.mean)
    assert all(0.1 < float(jnp.std(x)) < 3 for x in (*latent, image))


def test_it_encodes_sizes_that_it_was_not_trained_on():
    image = run(SMALL, lambda model, x: model.decode(model.encode(x).mean), images(1, 24, 10, 3))
    assert image.shape == (1, 24, 10, 3)


def test_every_parameter_matters():
    graph, _ = abstract_autoencoder(VQ)
    key = jax.random.key(0)

    def loss(p, x):
        model = nnx.merge(graph, p)
        quantized = model.quantizer(model.features(x))
        reconstruction = model.decode(quantized.latent)
        weight = jax.random.normal(key, x.shape)
        return jnp.sum(reconstruction * weight) + jnp.sum(quantized.loss_B)

    gradients = jax.jit(jax.grad(loss))(parameters(VQ), jnp.asarray(images(2, 16, 16, 3)))
    flat = traverse_util.flatten_dict(gradients)
    dead = {name for name, gradient in flat.items() if float(jnp.max(jnp.abs(gradient))) == 0}
    # A bias of the keys adds the same to all logits of a query, which the softmax ignores. Its
    # gradient is 0 up to rounding.
    assert {name for name in dead if name[-2:] != ("to_k", "bias")} == set()


def test_the_output_is_linear_in_the_last_kernel():
    flat = traverse_util.flatten_dict(parameters(SMALL))
    graph, _ = abstract_autoencoder(SMALL)
    latent = images(1, 4, 4, 4)

    @jax.jit
    def decode(factor):
        scaled = traverse_util.unflatten_dict(flat | {LAST_KERNEL: factor * flat[LAST_KERNEL]})
        return nnx.merge(graph, scaled).decode(latent)

    bias = flat["decoder", "conv_out", "bias"][None, None, None]
    np.testing.assert_allclose(decode(0.0), np.broadcast_to(bias, (1, 8, 8, 3)), rtol=1e-6)
    np.testing.assert_allclose(decode(3.0) - bias, 3 * (decode(1.0) - bias), rtol=1e-4, atol=1e-5)


def test_a_batch_cut_by_a_mesh_gives_the_same():
    def quantise(model, x):
        return model.quantizer(model.features(x))

    graph, abstract = abstract_autoencoder(VQ)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = images(4, 16, 16, 3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(parameters(VQ), parameter_shardings(abstract, mesh))
        cut_x = jax.device_put(x, batch_sharding(mesh))
        cut = jax.jit(lambda p, x: quantise(nnx.merge(graph, p), x))(placed, cut_x)
    whole = run(VQ, quantise, x)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert cut.codes.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_array_equal(cut.codes, whole.codes)
    np.testing.assert_allclose(cut.loss_B, whole.loss_B, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 30, "multipliers": (1, 2, 4)}, "model.size=30 must be a multiple of 4"),
        ({"groups": 3}, r"model.groups=3 must divide the channels of each resolution, \(8, 16\)"),
        ({"kind": "gan"}, "model.kind='gan'"),
        ({"codes": 0}, "model.codes=0 must be positive"),
        ({"multipliers": (1, 0)}, r"model.multipliers=\(1, 0\) must be positive"),
        ({"multipliers": ()}, r"model.multipliers=\(\) must be positive, and at least one"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# The Gaussian.


def test_kl_of_known_gaussians():
    mean = np.array([0.0, 2.0, -1.0])
    variance = np.array([1.0, 0.25, 3.0])
    element = 0.5 * (mean**2 + variance - 1 - np.log(variance))

    def everywhere(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32)[:, None, None, None], (3, 2, 2, 5))

    kl = Gaussian(everywhere(mean), everywhere(np.log(variance))).kl()
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
    codebook = rng.normal(size=(n, 3)).astype(np.float32)
    latents = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
    distances = np.sum((latents[..., None, :].astype(np.float64) - codebook) ** 2, axis=-1)
    indices = q.nearest(jnp.asarray(latents), jnp.asarray(codebook))
    np.testing.assert_array_equal(indices, np.argmin(distances, axis=-1))


def test_ties_go_to_the_first_code():
    codebook = jnp.zeros((q.CHUNK + 3, 2))
    indices = q.nearest(jnp.ones((1, 2, 2, 2)), codebook)
    np.testing.assert_array_equal(indices, np.zeros((1, 2, 2)))


def test_gradients_pass_straight_through():
    module = q.Quantizer(16, 3, rngs=nnx.Rngs(params=0))
    latent = jnp.asarray(images(2, 4, 4, 3))
    weight = jnp.asarray(images(2, 4, 4, 3, seed=1))
    out = module(latent)
    np.testing.assert_allclose(out.latent, module.lookup(out.codes), atol=1e-7)
    gradient = jax.grad(lambda z: jnp.sum(module(z).latent * weight))(latent)
    np.testing.assert_array_equal(gradient, weight)


def test_the_codebook_loss_moves_codes_and_the_commitment_loss_latents():
    module = q.Quantizer(16, 3, rngs=nnx.Rngs(params=0))
    graph, state = nnx.split(module)
    latent = jnp.asarray(images(2, 4, 4, 3))
    elements = 4 * 4 * 3

    def loss(state, latent, commitment):
        return jnp.sum(nnx.merge(graph, state)(latent, commitment).loss_B)

    def codebook_gradient(commitment):
        return jax.grad(loss)(state, latent, commitment)["codebook"][...]

    out = module(latent)
    apart = latent - module.lookup(out.codes)
    expected_loss = 1.25 * jnp.mean(apart**2, axis=(1, 2, 3))
    np.testing.assert_allclose(out.loss_B, expected_loss, rtol=1e-6)

    latent_gradient = jax.grad(loss, 1)(state, latent, 0.25)
    expected = 0.25 * 2 * apart / elements
    np.testing.assert_allclose(latent_gradient, expected, rtol=1e-5, atol=1e-8)

    expected = np.zeros((16, 3))
    pulls = np.asarray(-2 * apart / elements).reshape(-1, 3)
    np.add.at(expected, np.asarray(out.codes).reshape(-1), pulls)
    np.testing.assert_allclose(codebook_gradient(0.25), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(codebook_gradient(0.25), codebook_gradient(0.0))


def test_usage_in_closed_form():
    even = q.usage(jnp.arange(8).reshape(1, 2, 4), 16)
    np.testing.assert_allclose([even.share, even.perplexity], [0.5, 8.0], rtol=1e-6)
    one = q.usage(jnp.full((3, 2, 2), 5), 16)
    np.testing.assert_allclose([one.share, one.perplexity], [1 / 16, 1.0], rtol=1e-6)
    uneven = q.usage(jnp.array([0, 0, 0, 1]), 2)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    np.testing.assert_allclose(uneven.perplexity, math.exp(entropy), rtol=1e-6)


def test_dead_codes_are_revived_and_live_ones_stay():
    key = jax.random.key(0)
    codebook = images(6, 3)
    latents = images(2, 4, 4, 3, seed=1) + 10.0
    counts = q.count(jnp.array([[0, 2], [2, 5]]), 6)
    np.testing.assert_array_equal(counts, [1, 0, 2, 0, 0, 1])
    new = np.asarray(q.revive(jnp.asarray(codebook), jnp.asarray(latents), counts, key))
    np.testing.assert_array_equal(new[[0, 2, 5]], codebook[[0, 2, 5]])
    revived = {tuple(code) for code in new[[1, 3, 4]]}
    assert revived <= {tuple(latent) for latent in latents.reshape(-1, 3)}
    assert len(revived) > 1
    all_used = q.revive(jnp.asarray(codebook), jnp.asarray(latents), counts * 0 + 1, key)
    np.testing.assert_array_equal(all_used, codebook)


# Our own layout.


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("config", [SMALL, VQ], ids=["kl", "vq"])
def test_a_saved_codec_loads_the_same(config, tmp_path):
    graph, _ = abstract_autoencoder(config)
    model = nnx.merge(graph, parameters(config, 3))
    save_codec(tmp_path / "a", config, nnx.state(model, nnx.Param), 0.5, -0.25)
    save_codec(tmp_path / "b", config, parameters(config, 3), 0.5, -0.25)
    codec = load_codec(tmp_path / "a")
    assert (codec.config, codec.scale, codec.shift) == (config, 0.5, -0.25)
    jax.tree.map(np.testing.assert_array_equal, codec.parameters, parameters(config, 3))
    files = contents(tmp_path / "a")
    assert files.keys() == {"config.json", "weights.safetensors"}
    assert files == contents(tmp_path / "b")
    assert codec.digest == load_codec(tmp_path / "b").digest


def test_a_failed_save_leaves_the_old_codec_and_no_partial_file(tmp_path, monkeypatch):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    before = contents(tmp_path)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_codec(tmp_path, SMALL, parameters(SMALL, 1), 1.0, 0.0)
    assert contents(tmp_path) == before


def test_a_save_killed_between_the_renames_leaves_no_config(tmp_path, monkeypatch):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    rename = os.replace

    def killed_after_one(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        save_codec(tmp_path, SMALL, parameters(SMALL, 1), 1.0, 0.0)
    with pytest.raises(ValueError, match="no config.json"):
        load_codec(tmp_path)


def test_digest_changes_with_weights_config_and_scale(tmp_path):
    save_codec(tmp_path / "a", SMALL, parameters(SMALL, 0), 1.0, 0.0)
    save_codec(tmp_path / "b", SMALL, parameters(SMALL, 1), 1.0, 0.0)
    save_codec(tmp_path / "c", SMALL, parameters(SMALL, 0), 2.0, 0.0)
    save_codec(tmp_path / "d", dataclasses.replace(SMALL, groups=2), parameters(SMALL, 0), 1.0, 0.0)
    digests = {load_codec(tmp_path / name).digest for name in "abcd"}
    assert len(digests) == 4 and all(len(d) == 64 for d in digests)


def test_codec_encodes_and_decodes(tmp_path):
    save_codec(tmp_path, SMALL, parameters(SMALL), 1.0, 0.0)
    codec = load_codec(tmp_path)
    x = images(2, 16, 8, 3)
    mean, deviation = codec.encode(x)
    latent = run(SMALL, lambda model, x: model.encode(x), x)
    assert mean.shape == deviation.shape == (2, *codec.latent_shape(16, 8)) == (2, 8, 4, 4)
    np.testing.assert_allclose(mean, latent.mean, atol=1e-5)
    np.testing.assert_allclose(deviation, jnp.exp(latent.log_variance / 2), atol=1e-5)
    decoded = codec.decode(100 * np.asarray(mean))
    assert decoded.shape == x.shape
    assert float(jnp.max(decoded)) == 1 and float(jnp.min(decoded)) == -1


def test_a_vq_codec_gives_codes_without_deviation(tmp_path):
    save_codec(tmp_path, VQ, parameters(VQ), 1.0, 0.0)
    codec = load_codec(tmp_path)
    mean, deviation = codec.encode(images(2, 16, 16, 3))
    codebook = {tuple(code) for code in np.asarray(codec.parameters["quantizer"]["codebook"])}
    assert {tuple(latent) for latent in np.asarray(mean).reshape(-1, 4)} <= codebook
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


def test_a_missing_codec_is_one_clear_error(tmp_path):
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
    message = "no weights.safetensors in .*; weights.bin cannot be read"
    with pytest.raises(ValueError, match=message):
        load_codec(tmp_path)


# Diffusers' layout.


def published(
    channels: tuple[int, ...] = (8, 16), z: int = 4, projected: bool = True, **more
) -> tuple[dict, dict]:
    """config.json and random tensors, named as in published checkpoints with two resolutions."""
    rng = np.random.default_rng(0)
    tensors = {}

    def add(name, *shape):
        fan_in = math.prod(shape[1:])
        tensors[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) / math.sqrt(fan_in)
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
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": z,
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
        "force_upcast": True,
    }
    if not projected:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config | more, tensors


def publish(directory, config: dict, tensors: dict, variant: str = ""):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    file = directory / f"diffusion_pytorch_model{variant}.safetensors"
    safetensors.numpy.save_file(tensors, file)
    return directory


def test_published_codec_saved_as_ours_is_the_same(tmp_path):
    config, tensors = published(scaling_factor=0.3611, shift_factor=0.1159)
    codec = load_codec(publish(tmp_path / "theirs", config, tensors))
    save_codec(tmp_path / "ours", codec.config, codec.parameters, codec.scale, codec.shift)
    again = load_codec(tmp_path / "ours")
    x = images(1, 16, 16, 3)
    assert again.digest == codec.digest
    np.testing.assert_array_equal(again.encode(x)[0], codec.encode(x)[0])


def test_old_names_and_convolutions_of_attention_load_the_same(tmp_path):
    config, tensors = published()
    new = load_codec(publish(tmp_path / "new", config, tensors))
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for current, old in old_names.items():
        renamed = {
            name.replace(f"attentions.0.{current}.", f"attentions.0.{old}."): tensor
            for name, tensor in renamed.items()
        }
    assert len(renamed.keys() - tensors.keys()) == 2 * 2 * 4
    assert load_codec(publish(tmp_path / "old", config, renamed)).digest == new.digest
    convolutions = {
        name: x[:, :, None, None] if "attentions" in name and x.ndim == 2 else x
        for name, x in tensors.items()
    }
    published_again = publish(tmp_path / "convolutions", config, convolutions)
    assert load_codec(published_again).digest == new.digest


def test_half_precision_files_load(tmp_path):
    config, tensors = published()
    full = load_codec(publish(tmp_path / "full", config, tensors))
    for dtype, variant, bits in ((np.float16, ".fp16", 11), (jnp.bfloat16, "", 8)):
        rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        directory = publish(tmp_path / np.dtype(dtype).name, config, rounded, variant)
        half = jax.tree.leaves(load_codec(directory).parameters)
        for leaf, exact in zip(half, jax.tree.leaves(full.parameters), strict=True):
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, exact, rtol=2.0**-bits, atol=1e-6)


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
    message = str(error.value)
    attention = "decoder.mid_block.attentions.0"
    assert f"36 missing ({attention}.to_q.bias, {attention}.to_q" in message
    assert "1 unknown (loss.logvar)" in message
    wrong = "decoder.conv_in.weight (16, 5, 3, 3) instead of (16, 4, 3, 3)"
    assert f"1 of another shape ({wrong})" in message


def test_bin_instead_of_safetensors_is_named(tmp_path):
    directory = publish(tmp_path / "x", *published())
    weights = directory / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = "no diffusion_pytorch_model.safetensors in .*model.bin cannot be read"
    with pytest.raises(ValueError, match=message):
        load_codec(directory)


# The published architectures made narrow: everything they differ in, and the depth of the first.
ARCHITECTURES = {
    "stable_diffusion_1": {
        "block_out_channels": (8, 16, 24, 24),
        "layers_per_block": 2,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    "stable_diffusion_xl": {
        "block_out_channels": (8, 16),
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    },
    "stable_diffusion_3": {
        "block_out_channels": (8, 16),
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "flux": {
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "no_middle_attention": {"block_out_channels": (8, 12), "mid_block_add_attention": False},
}


@pytest.fixture(scope="module")
def oracle():
    """The modules torch and diffusers."""
    reason = "needs torch and diffusers, whose autoencoder is the reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn
        torch = pytest.importorskip("torch", reason=reason)
        diffusers = pytest.importorskip("diffusers", reason=reason)
    return torch, diffusers


def diffusers_autoencoder(oracle, **config):
    """Diffusers' `AutoencoderKL` with random weights."""
    torch, diffusers = oracle
    levels = len(config["block_out_channels"])
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        **config,
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.data = math.prod(weight.shape[1:]) ** -0.5 * noise
        else:
            weight.data = 0.5 + 0.3 * noise
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

    def channels_last(tensor):
        return tensor.numpy().transpose(0, 2, 3, 1)

    x = images(2, 16, 24, 3)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
        expected_mean = channels_last(posterior.mean)
        expected_deviation = channels_last(posterior.std)
        expected_images = channels_last(theirs.decode(posterior.mean).sample.clip(-1, 1))
    for expected in (expected_mean, expected_deviation, expected_images):
        assert expected.std() > 0.1  # far above the tolerance
    mean, deviation = codec.encode(x)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-4, rtol=0)
    np.testing.assert_allclose(deviation, expected_deviation, atol=1e-4, rtol=0)
    np.testing.assert_allclose(codec.decode(expected_mean), expected_images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("projected", [True, False])
def test_published_in_this_file_has_the_names_and_shapes_of_diffusers(projected, oracle):
    config, tensors = published(projected=projected)
    fields = (
        "block_out_channels",
        "layers_per_block",
        "latent_channels",
        "use_quant_conv",
        "use_post_quant_conv",
    )
    options = {name: config[name] for name in fields if name in config}
    theirs = diffusers_autoencoder(oracle, **options).state_dict()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == shapes
