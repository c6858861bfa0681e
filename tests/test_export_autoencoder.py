"""`export --format autoencoder`: diffusers' own code encodes and decodes the same."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from autoencoder_cases import SMALL, VQ, images, parameters

from transfusion_jax.autoencoder import published
from transfusion_jax.autoencoder.codec import WEIGHTS, load_codec, save_codec
from transfusion_jax.commands.main import main

SCALE, SHIFT = 0.7, 0.2
KINDS = {
    "attention in the encoder": replace(SMALL, encoder_attention=True),
    "three resolutions, two blocks": replace(
        SMALL, multipliers=(1, 2, 3), blocks=2, encoder_attention=False
    ),
    "no projection": replace(SMALL, latent_projection=False, encoder_attention=False),
    "no attention, grey": replace(
        SMALL, middle_attention=False, encoder_attention=False, channels=1
    ),
    "fewer channels than groups": replace(SMALL, multipliers=(1, 1), groups=32),
}


@pytest.fixture(scope="module")
def oracle():
    """The modules torch and diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their imports warn
        return pytest.importorskip("torch"), pytest.importorskip("diffusers")


def exported(tmp_path, config, *flags: str) -> int:
    """Writes a run with an autoencoder, and exports it; returns the exit code."""
    weights = parameters(config)
    if config.kind == "vq":  # entries as far apart as latents are
        entries = np.random.default_rng(1).normal(size=(config.codes, config.latent_channels))
        weights = {**weights, "quantizer": {"codebook": entries.astype(np.float32)}}
    save_codec(tmp_path / "run" / "autoencoder", config, weights, SCALE, SHIFT)
    words = ["export", str(tmp_path / "run"), "--format", "autoencoder"]
    return main([*words, "--out", str(tmp_path / "out"), *flags])


def last(tensor) -> np.ndarray:
    """Channels last, as here."""
    return tensor.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_and_decoding_equal_those_of_diffusers(kind, oracle, tmp_path):
    torch, diffusers = oracle
    config = KINDS[kind]
    assert exported(tmp_path, config) == 0
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    ours = load_codec(tmp_path / "run" / "autoencoder")
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (SCALE, SHIFT)
    x = images(2, 16, 24, config.channels)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
        pictures = last(theirs.decode(posterior.mean).sample.clip(-1, 1))
    mean, deviation = ours.encode(x)
    assert np.std(mean) > 0.1 and np.std(pictures) > 0.1  # far above the tolerance
    np.testing.assert_allclose(last(posterior.mean), mean, atol=1e-4, rtol=0)
    np.testing.assert_allclose(last(posterior.std), deviation, atol=1e-4, rtol=0)
    np.testing.assert_allclose(pictures, ours.decode(mean), atol=1e-4, rtol=0)


def test_codes_equal_those_of_diffusers(oracle, tmp_path):
    torch, diffusers = oracle
    assert exported(tmp_path, VQ) == 0
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "out").eval()
    ours = load_codec(tmp_path / "run" / "autoencoder")
    x = images(2, 16, 24, 3)
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latents
        codes = theirs.quantize(latents)[2][2].numpy().reshape(2, 8, 12, 1)
        pictures = last(theirs.decode(latents).sample.clip(-1, 1))
    assert len(np.unique(codes)) > 2
    np.testing.assert_array_equal(ours.codes(x), codes)
    np.testing.assert_allclose(pictures, ours.decode(ours.encode(x)[0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_as_it_was(kind, tmp_path):
    assert exported(tmp_path, KINDS[kind]) == 0
    ours, again = load_codec(tmp_path / "run" / "autoencoder"), load_codec(tmp_path / "out")
    assert (again.scale, again.shift) == (ours.scale, ours.shift)
    assert again.config.widths == ours.config.widths
    x = images(1, 16, 16, ours.config.channels)
    for left, right in zip(again.encode(x), ours.encode(x), strict=True):
        np.testing.assert_array_equal(left, right)


def test_in_bfloat16_half_the_bytes_and_nearly_the_same(tmp_path):
    assert exported(tmp_path, SMALL, "--dtype", "bfloat16") == 0
    again = load_codec(tmp_path / "out")
    whole = load_codec(tmp_path / "run" / "autoencoder")
    x = images(1, 16, 16, 3)
    np.testing.assert_allclose(again.encode(x)[0], whole.encode(x)[0], atol=0.1)
    assert again.digest != whole.digest
    files = [tmp_path / "out" / published.WEIGHTS[0], tmp_path / "run" / "autoencoder" / WEIGHTS]
    half, full = (file.stat().st_size for file in files)
    assert half < 0.6 * full


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (replace(SMALL, groups=16), (), "one number of groups for all layers, not [8, 16]"),
        (replace(VQ, latent_projection=False), (), "VQModel always has 1x1 convolutions"),
        (SMALL, ("--step", "5"), "only the average of its last step"),
        (SMALL, ("--weights", "raw"), "only the average of its last step"),
    ],
)
def test_what_diffusers_has_not_is_refused_in_a_line(config, flags, message, tmp_path, capsys):
    assert exported(tmp_path, config, *flags) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_a_run_without_an_autoencoder_is_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    words = ["export", str(tmp_path / "run"), "--format", "autoencoder"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "no autoencoder in" in capsys.readouterr().err


def test_attention_blocks_are_known_at_the_lowest_resolution_alone():
    raw = published.to_config(KINDS["attention in the encoder"], 1.0, 0.0)
    assert published.read_config(raw)[0].encoder_attention
    raw["down_block_types"].reverse()
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        published.read_config(json.loads(json.dumps(raw)))
