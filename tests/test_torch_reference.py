"""The reference loader (`examples/torch_reference.py`) computes and draws what we do."""

import functools
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
import test_families
import tiny
from exported import a_tokenizer, planned, run_directory, weights
from flax import nnx

from transfusion_jax.commands.main import main
from transfusion_jax.config import DiffusionConfig, SamplerConfig
from transfusion_jax.generation.engine import Engine
from transfusion_jax.model.patches.unet import Conv
from transfusion_jax.model.published import image_config, text_config, to_published

torch = pytest.importorskip("torch")

FILE = Path(__file__).parents[1] / "examples" / "torch_reference.py"
CASES = {
    "the paper's": {},
    "timestep after, learned places": {"timestep": "after", "patch_position": "learned"},
    "query-key norm, post-norm": {"qk_norm": True, "norm_placement": "post"},
    "causal images": {"image_attention": "causal"},
}
PACKINGS = ["several images", "documents with images", "image at both ends", "padding", "one text"]
DIFFUSIONS = {
    "epsilon, ddpm": (DiffusionConfig(steps=100), {}),
    "v, ddim, linear": (
        DiffusionConfig(steps=100, schedule="linear", prediction="v"), {"kind": "ddim"},
    ),
    "flow": (DiffusionConfig(steps=100, schedule="flow", prediction="flow"), {"guidance": 1.0}),
    "x, shifted": (
        DiffusionConfig(steps=100, prediction="x", snr_scale=0.25), {"clip": 0.0},
    ),
}  # fmt: skip


@functools.cache
def reference():
    spec = importlib.util.spec_from_file_location("torch_reference", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAIN = DiffusionConfig(steps=100)


def an_experiment(diffusion=PLAIN, sampler=None, **model):
    small = tiny.small(**model)
    changed = {"steps": 4, "max_tokens": 20, "context_timestep": 7, **(sampler or {})}
    return replace(
        small,
        model=replace(small.model, vocab_size=304),
        diffusion=diffusion,
        sampler=SamplerConfig(**changed),
    )


def loaded(experiment, path):
    """The reference model of random weights, and ours."""
    run_directory(path / "run", experiment)
    flags = ["--format", "safetensors", "--out", str(path / "out")]
    assert main(["export", str(path / "run"), *flags]) == 0
    return reference().Model(path / "out"), weights(experiment, 3)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_predictions_of_mixed_rows_are_ours(case, tmp_path):
    experiment = an_experiment(**CASES[case])
    theirs, parameters = loaded(experiment, tmp_path)
    batch = packings.batch([packings.PACKINGS[name] for name in PACKINGS], vocabulary=298)
    rng = np.random.default_rng(1)
    noisy = rng.standard_normal(batch.latents_BMhwc.shape).astype(np.float32)
    t = rng.integers(0, 100, batch.image_start_BM.shape).astype(np.int32)

    @jax.jit
    def ours(parameters, batch, noisy, t):
        model = nnx.merge(planned(experiment).graph, parameters)
        hidden_BLD, predicted = model(batch, noisy, t)
        return model.logits(hidden_BLD), predicted

    expected = ours(parameters, jax.tree.map(jnp.asarray, batch), noisy, t)
    rows = (batch.tokens_BL, batch.segment_BL, batch.position_BL, noisy, t, batch.image_start_BM)
    with torch.no_grad():
        found = theirs(*(torch.from_numpy(np.asarray(x)) for x in map(_wide, rows)))
    text, image = batch.segment_BL > 0, batch.image_start_BM < packings.LENGTH
    assert text.sum() == 80 and image.sum() == 10
    for name, ours, theirs, where in zip("lp", expected, found, (text, image), strict=True):
        ours, theirs = np.asarray(ours)[where], theirs.numpy()[where]
        assert np.abs(ours).max() > 0.5, name
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4, err_msg=name)


def test_a_convolution_leaves_as_torch_has_it():
    """Of a U-Net, which the reference does not read."""
    conv = Conv(3, 5, rngs=nnx.Rngs(params=0))
    x_Nhwc = np.random.default_rng(0).standard_normal((2, 6, 8, 3)).astype(np.float32)
    kernel = torch.from_numpy(np.array(to_published("conv.kernel", np.asarray(conv.kernel[...]))))
    x = torch.from_numpy(x_Nhwc).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.conv2d(x, kernel, padding=1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(theirs, conv(jnp.asarray(x_Nhwc)), rtol=0, atol=1e-5)


def _wide(x):
    """Integers as torch indexes with them."""
    return np.asarray(x, np.int64) if np.issubdtype(np.asarray(x).dtype, np.integer) else x


def noise_of(engine, seed):
    """The noise that the engine's first request draws its images from."""
    key = engine.devices.keys(seed, 0, 1)[0]

    def noise(position, i):
        at = jax.random.fold_in(jax.random.fold_in(key, position), i)
        drawn = jax.random.normal(at, engine.experiment.image.shape)
        return torch.from_numpy(np.array(drawn))

    return noise


def compared(experiment, path):
    """The reference model, and the engine on the same weights."""
    theirs, parameters = loaded(experiment, path)
    return theirs, Engine(experiment, a_tokenizer(), planned(experiment).graph, parameters)


@pytest.mark.long
@pytest.mark.parametrize("case", DIFFUSIONS)
def test_an_image_and_what_follows_it_are_ours_from_the_same_noise(case, tmp_path):
    theirs, engine = compared(an_experiment(*DIFFUSIONS[case]), tmp_path)
    tokenizer = engine.tokenizer
    image, *after = ours = engine.generate([("a small red star",)], seed=5, draw=True)[0]
    assert image.std() > 0.1 and after
    ids = [tokenizer.bos, *tokenizer.encode("a small red star"), tokenizer.boi]
    assert_same_spans(theirs.write(ids, noise_of(engine, 5)), ours, tokenizer)


def test_a_caption_is_ours(tmp_path):
    theirs, engine = compared(an_experiment(), tmp_path)
    tokenizer, shape = engine.tokenizer, engine.experiment.image.shape
    picture = np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)
    ours = engine.generate([(picture, "two")], seed=1)[0]
    assert isinstance(ours[0], str) and len(ours[0]) > 3
    patches = [0] * engine.experiment.image.patches
    ids = [tokenizer.bos, tokenizer.boi, *patches, tokenizer.eoi, *tokenizer.encode("two")]
    found = theirs.write(ids, noise_of(engine, 1), (torch.from_numpy(picture),))
    assert_same_spans(found, ours, tokenizer)
    other = theirs.write(ids, noise_of(engine, 1), (torch.from_numpy(-picture),))
    assert other[0] != found[0]  # it is about the picture


def assert_same_spans(found, ours, tokenizer):
    assert len(found) == len(ours)
    for theirs, our in zip(found, ours, strict=True):
        if isinstance(our, str):
            assert tokenizer.decode(theirs) == our
        else:
            np.testing.assert_allclose(theirs.numpy(), our, rtol=0, atol=1e-4)


def test_the_example_runs_as_its_docstring_says(tmp_path, capsys, monkeypatch):
    loaded(an_experiment(), tmp_path)
    monkeypatch.setattr(sys, "argv", [str(FILE), str(tmp_path / "out"), "1", "298"])
    capsys.readouterr()
    spec = importlib.util.spec_from_file_location("__main__", FILE)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capsys.readouterr().out.startswith("tensor([[[")
    assert len(FILE.read_text().splitlines()) <= 250


@pytest.mark.parametrize("name", ["unet", "chameleon", "llama", "mixture", "scaled"])
def test_what_it_cannot_read_is_one_line(name, tmp_path):
    experiment = test_families.experiment("linear" if name == "scaled" else name)
    part = image_config(experiment)
    config = {"text_config": text_config(experiment.model, 48), "image_config": part}
    if name == "scaled":
        config["text_config"]["rope_parameters"]["rope_type"] = "llama3"
    stored = {name: part for name, part in config.items() if part is not None}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="not linear, shared, default$") as refused:
        reference().Model(tmp_path)
    assert "\n" not in str(refused.value)
