"""Autoencoders saved and loaded in our own layout, and what loading refuses."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import SMALL, VQ, images, parameters, run
from flax import nnx

from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.autoencoder.vae import abstract_autoencoder


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


def test_a_vq_codec_shows_a_model_codes_and_draws_from_them(tmp_path):
    """`image` gives the number of the code nearest to each place, `picture` decodes that code."""
    save_codec(tmp_path, VQ, parameters(VQ), 1.0, 0.0)
    codec = load_codec(tmp_path)
    pictures = np.asarray(images(3, 16, 16, 3))
    latents, _ = codec.encode(pictures)
    codebook = np.asarray(codec.parameters["quantizer"]["codebook"])
    for picture, latent_hwc in zip(pictures, np.asarray(latents), strict=True):
        shown = codec.image(picture)
        assert shown.shape == (*latent_hwc.shape[:2], 1)
        np.testing.assert_array_equal(codebook[shown[..., 0].astype(int)], latent_hwc)
        expected = codec.decode(latent_hwc[None])[0]
        np.testing.assert_allclose(codec.picture(shown), expected, atol=1e-5)


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
        ({"kind": "gan"}, "kind='gan' is not one of 'kl', 'vq'"),
        ({"blocks": 2.0}, "blocks=2.0 must be an integer"),
        ({"scale": 0.0}, "a scale of 0.0 cannot be undone"),
        ({"scale": float("nan")}, "a scale of nan cannot be undone"),
        ({"shift": float("inf")}, "a shift of inf is no finite number"),
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
