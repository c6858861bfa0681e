"""Autoencoders published in diffusers' layout, compared with diffusers where it is installed."""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from autoencoder_cases import images

from transfusion_jax.autoencoder.codec import load_codec, save_codec


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


def test_models_see_latents_less_the_shift_times_the_scale(tmp_path):
    config, tensors = published(scaling_factor=0.3611, shift_factor=0.1159)
    codec = load_codec(publish(tmp_path, config, tensors))
    picture = images(1, 16, 16, 3)[0]
    mean = np.asarray(codec.encode(picture[None])[0][0])
    seen = codec.image(picture)
    np.testing.assert_allclose(seen, (mean - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    decoded = np.asarray(codec.decode(mean[None])[0])
    np.testing.assert_allclose(codec.picture(seen), decoded, atol=1e-4)
    assert np.abs(decoded - codec.decode(seen[None])[0]).max() > 1e-2


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
            {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
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
