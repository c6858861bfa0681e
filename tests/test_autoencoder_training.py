import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import line
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.autoencoder.config import (
    AutoencoderConfig,
    AutoencoderExperiment,
    AutoencoderTrainConfig,
    LossConfig,
)
from transfusion_jax.autoencoder.training import losses
from transfusion_jax.autoencoder.training.judges import Judges
from transfusion_jax.autoencoder.training.pictures import batches, pictures
from transfusion_jax.autoencoder.training.reconstruction import compare
from transfusion_jax.autoencoder.training.run import open_run, train_autoencoder
from transfusion_jax.autoencoder.training.state import blueprint
from transfusion_jax.autoencoder.training.step import compiled_step
from transfusion_jax.autoencoder.training.summary import Reconstructed, measure
from transfusion_jax.autoencoder.vae import LAST_KERNEL
from transfusion_jax.config import MeshConfig, OptimizerConfig
from transfusion_jax.data.sources import digits
from transfusion_jax.metrics.psnr import psnr
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.training.checkpoint import load_average
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.watchdog import Watch

pytestmark = pytest.mark.one_jax

ONE = MeshConfig(data=1)
STEPS, GAN_START = 8, 3


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Most of the time here is compiling; nothing runs long enough for optimisations to pay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tiny():
    """Digits at 8x8, in a network whose step takes milliseconds; over all eight devices."""
    return AutoencoderExperiment(
        name="tiny",
        data="digits",
        model=AutoencoderConfig(
            size=8, channels=1, latent_channels=2, width=4, multipliers=(1,), groups=2, blocks=1,
            codes=32, middle_attention=False, encoder_attention=False,
        ),
        loss=LossConfig(
            lpips=0.0, gan_start=GAN_START, discriminator_width=4, discriminator_layers=1,
            revive_every=2,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=1, weight_decay=0.0
        ),
        train=AutoencoderTrainConfig(
            steps=STEPS, batch=16, ema_decay=0.5, log_every=1, checkpoint_every=100, sample_every=5
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """An uninterrupted run: directory, summary, what was said."""
    directory, said = tmp_path_factory.mktemp("runs") / "whole", []
    return directory, train_autoencoder(open_run(tiny, directory, said.append), said.append), said


def test_a_run_leaves_what_a_run_directory_holds(tiny, trained):
    directory, summary, said = trained
    assert any("does without the ID term" in line for line in said)
    rows = read_metrics(directory)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = {
        "l1",
        "kl",
        "gan",
        "gan_weight",
        "discriminator",
        "psnr",
        "grad_norm",
        "learning_rate",
    }
    assert wanted | {"loss", "images_per_second", "data_wait_share"} <= set(rows[-1])
    assert [row["gan_weight"] > 0 for row in rows] == [step >= GAN_START for step in range(STEPS)]
    assert json.loads((directory / "summary.json").read_text()) == summary
    samples = {path.name for path in (directory / "samples").iterdir()}
    assert samples == {"step_0000005.png", "step_0000008.png", "reconstructions.png"}
    assert any((directory / "tensorboard").iterdir())
    with pytest.raises(ValueError, match=r"train\.batch: 16 -> 32"):
        open_run(replace(tiny, train=replace(tiny.train, batch=32)), directory, said.append)


def test_the_codec_of_a_run_is_its_average_and_reads_back(tiny, trained):
    directory, summary, _ = trained
    codec, (images, _) = load_codec(directory / "autoencoder"), digits.load("held_out")
    mean, deviation = codec.encode(images)
    abstract = blueprint(tiny, make_mesh(ONE, jax.devices()[:1])).abstract
    _, ema = load_average(directory / "checkpoints", abstract.ema, print)
    jax.tree.map(np.testing.assert_array_equal, codec.parameters, ema)
    np.testing.assert_allclose(
        psnr(jnp.asarray(images), codec.decode(mean)).mean(), summary["psnr"], rtol=1e-4
    )
    assert codec.shift == 0 and codec.scale == summary["latent_scale"]
    sampled = mean + deviation * jax.random.normal(jax.random.key(0), mean.shape)
    np.testing.assert_allclose(np.std(np.asarray(sampled)) * codec.scale, 1, rtol=0.05)


@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit(tiny, trained, tmp_path, monkeypatch):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "moved", line.signal_at(5))
        assert train_autoencoder(open_run(tiny, tmp_path / "run", said.append), said.append) is None
    assert "stopped by SIGTERM at step 5" in said[-1]
    summary = train_autoencoder(open_run(tiny, tmp_path / "run", said.append), said.append)

    def learned(directory):
        rows = read_metrics(directory)
        times = {"images_per_second", "data_wait_share", "time", "step_seconds", "goodput"}
        return [{k: v for k, v in row.items() if k not in times} for row in rows]

    assert learned(tmp_path / "run") == learned(trained[0])
    assert {**summary, "train_seconds": 0} == {**trained[1], "train_seconds": 0}
    weights = [
        (d / "autoencoder" / "weights.safetensors").read_bytes()
        for d in (tmp_path / "run", trained[0])
    ]
    assert weights[0] == weights[1]


def single(experiment):
    """Everything for steps on one device: blueprint, step, state."""
    planned = blueprint(experiment, make_mesh(ONE, jax.devices()[:1]))
    return planned, compiled_step(planned), planned.initialise()


@pytest.mark.slow
def test_one_device_trains_like_eight_and_skips_what_is_not_finite(tiny, trained):
    _, step, state = single(tiny)
    data = batches(tiny, range(tiny.train.batch))
    found = []
    for s in range(STEPS):
        old = state
        state, metrics = step(state, Judges(), data[s])
        found.append([float(metrics[name]) for name in ("loss", "l1", "gan", "discriminator")])
    wanted = [
        [row[name] for name in ("loss", "l1", "gan", "discriminator")]
        for row in read_metrics(trained[0])
    ]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
    assert step._cache_size() == 1
    assert all(
        x.is_deleted()
        for x in jax.tree.leaves((old.parameters, old.ema, old.optimizer, old.discriminator))
    )

    before = jax.device_get((state.parameters, state.ema, state.optimizer, state.discriminator))
    poisoned = np.array(data[0])
    poisoned[0, 0, 0] = np.nan
    for expected in (1, 2):
        state, metrics = step(state, Judges(), poisoned)
        assert int(metrics["skipped_in_a_row"]) == int(metrics["skipped"]) == expected
    after = jax.device_get((state.parameters, state.ema, state.optimizer, state.discriminator))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, metrics = step(state, Judges(), data[1])
    assert (int(metrics["skipped_in_a_row"]), int(state.step)) == (0, STEPS + 3)


@pytest.mark.long
def test_the_gradients_are_those_of_the_weighted_sum(tiny):
    """The step adds gradients at the reconstruction; here each term has its own backward pass.

    The same step shows the discriminator's loss: hinge, the pictures real and their
    reconstructions fake.
    """
    experiment = replace(tiny, loss=replace(tiny.loss, gan_start=0, kl=0.1))
    planned, step, state = single(experiment)
    image = jnp.asarray(batches(experiment, range(experiment.train.batch))[0])
    key = jax.random.fold_in(jax.random.key(0), 0)
    discriminator = nnx.merge(planned.discriminator_graph, state.discriminator)

    def terms(parameters):
        model = nnx.merge(planned.graph, parameters)
        gaussian = model.encode(image)
        found = model.decode(gaussian.sample(key))
        logits = discriminator(found)
        near = jnp.mean(jnp.abs(image - found))
        far = 0.1 * jnp.mean(gaussian.kl()) / (8 * 8)
        return jnp.stack([near, far, -jnp.mean(logits)]), logits

    def gradients(parameters):
        _, backward, logits = jax.vjp(terms, parameters, has_aux=True)
        return [backward(jnp.eye(3)[i])[0] for i in range(3)], logits

    def length(tree):
        return np.linalg.norm(tree[LAST_KERNEL[0]][LAST_KERNEL[1]][LAST_KERNEL[2]])

    (near, far, gan), fake = jax.jit(gradients)(state.parameters)
    real = jax.jit(discriminator)(image)
    weight = 0.5 * length(near) / (length(gan) + 1e-4)
    joined = jax.tree.map(lambda *g: g[0] + g[1] + np.float32(weight) * g[2], near, far, gan)
    _, metrics = step(state, Judges(), image)
    np.testing.assert_allclose(float(metrics["gan_weight"]), weight, rtol=1e-4)
    total = np.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(joined)))
    np.testing.assert_allclose(float(metrics["grad_norm"]), total, rtol=1e-4)

    def hinge(real, fake):
        return (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2

    real, fake = np.asarray(real), np.asarray(fake)
    assert abs(hinge(real, fake) - hinge(fake, real)) > 1e-3
    np.testing.assert_allclose(float(metrics["discriminator"]), hinge(real, fake), rtol=1e-4)


@pytest.mark.long
def test_steps_draw_anew_and_are_skipped_unless_loss_and_gradients_are_finite(tiny, monkeypatch):
    weighted = losses.weighted

    def marked(config, terms):
        """For pictures that differ by 2 and more, NaN gradients; by 5 and more, a NaN loss."""
        value = weighted(config, terms)
        difference = jax.lax.stop_gradient(jnp.max(terms["l1"]))
        nan_gradient = (difference > 2) & (difference < 5)
        root = jnp.sqrt(jnp.where(nan_gradient, 0 * terms["kl"], 1.0)) - 1.0
        return value + root + jnp.where(difference > 5, jnp.nan, 0.0)

    monkeypatch.setattr(losses, "weighted", marked)
    experiment = replace(tiny, loss=replace(tiny.loss, gan=0.0))
    _, step, state = single(experiment)
    image = jnp.asarray(batches(experiment, range(experiment.train.batch))[0])
    found = []
    for number in (0, 1, 0):
        copy = replace(jax.tree.map(jnp.copy, state), step=jnp.int32(number))
        found.append(float(step(copy, Judges(), image)[1]["l1"]))
    assert found[0] == found[2] != found[1]

    before = jax.device_get((state.parameters, state.ema, state.optimizer))
    for expected, size in enumerate((3, 8), start=1):
        state, metrics = step(state, Judges(), size * jnp.ones_like(image))
        assert math.isfinite(metrics["loss"]) == (size == 3)
        assert math.isfinite(metrics["grad_norm"]) == (size == 8)
        assert int(metrics["skipped"]) == expected
    after = jax.device_get((state.parameters, state.ema, state.optimizer))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.long
def test_vq_logs_its_codes_and_revives_dead_ones(tiny, tmp_path):
    loss = replace(tiny.loss, revive_codes=True, gan=0.0)
    experiment = replace(tiny, model=replace(tiny.model, kind="vq"), loss=loss, mesh=ONE)
    _, step, state = single(experiment)
    data = batches(experiment, range(experiment.train.batch))
    state, first = step(state, Judges(), data[0])
    used, before = (
        np.asarray(state.counts) > 0,
        np.asarray(state.parameters["quantizer"]["codebook"]),
    )
    assert (
        np.asarray(state.counts).sum() == 16 * 64
        and used.mean() == float(first["codebook_use"]) < 1
    )
    assert {"codebook", "codebook_perplexity"} <= set(first) and "kl" not in first
    state, _ = step(state, Judges(), data[1])  # two steps are over: revival
    book, average = (np.asarray(x["quantizer"]["codebook"]) for x in (state.parameters, state.ema))
    assert not np.asarray(state.counts).any()
    moved = np.abs(book - before).max(1) > 0.05
    assert moved.any() and not moved[used].any()
    np.testing.assert_array_equal(book[moved], average[moved])


# Bad input, and the experiments that ship


def test_bad_input_is_one_clear_error_before_any_work(tiny, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            open_run(replace(tiny, **changes), tmp_path / "run", [].append)
        assert not (tmp_path / "run").exists()

    refused("data='nothing' is neither", data="nothing")
    refused("scenes are RGB pictures of 32 or 64 pixels", data="scenes")
    refused("digits need model.size=8", model=replace(tiny.model, channels=3))
    refused(
        r"train\.batch=12 is not divisible by the 8 shards", train=replace(tiny.train, batch=12)
    )
    refused("needs pictures of 16 pixels, not 8", loss=replace(tiny.loss, lpips=1.0))
    refused("there is no file", loss=replace(tiny.loss, identity_weights="nowhere.pth"))


def test_experiments_that_ship():
    root = Path(__file__).parents[1] / "experiments"
    for name in ("vae_256", "vae_scenes"):
        points = {e.name: e for e in runpy.run_path(str(root / f"{name}.py"))["sweep"]()}
        assert [e.model.kind for e in points.values()] == ["kl", "vq"] and list(points) == [
            name,
            f"{name}_vq",
        ]
    scenes = points["vae_scenes"]
    assert scenes.loss.lpips == 1 and scenes.loss.gan_start < scenes.train.steps
    train, held_out = pictures(scenes, "train"), pictures(scenes, "held_out")
    assert (
        len(train) == 50_000
        and held_out[3].shape == (32, 32, 3)
        and held_out[3].dtype == np.float32
    )


class Spoken(Exception):
    """What a watch raises."""


def test_scores_are_measured_in_small_batches_and_can_be_stopped(tiny):
    """A device measures alone what many trained on; one picture has no Frechet distance."""
    planned = blueprint(tiny, make_mesh(ONE, jax.devices()[:1]))
    held_out = pictures(tiny, "held_out")[:37]
    seen, moved = [], []

    def reconstruct(parameters, image):
        seen.append(len(image))
        latent = jnp.asarray(image) * 0.5
        return Reconstructed(jnp.asarray(image), latent, jnp.ones_like(latent), None)

    def measured(pictures, moved=lambda: None):
        return measure(planned, reconstruct, None, Judges(), pictures, moved)

    found = measured(held_out, lambda: moved.append(0))
    assert seen == [16, 16, 5] and len(moved) == 3
    deviation = np.sqrt(np.var(0.5 * np.asarray(held_out)) + 1)
    np.testing.assert_allclose(found["latent_scale"], 1 / deviation, rtol=1e-5)
    assert measured(held_out[:1]).keys() == found.keys()

    def stop():
        raise Spoken

    with pytest.raises(Spoken):
        measured(held_out, stop)


@pytest.mark.parametrize(("count", "distance"), [(1, False), (2, True)])
def test_one_picture_has_no_frechet_distance(count, distance):
    image = np.random.default_rng(0).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)
    found = compare(jnp.asarray, [image], lambda x: jnp.mean(x, (1, 2)))
    assert ("reconstruction_fid_lpips" in found) == distance
    assert np.isfinite(list(found.values())[1:]).all()


def test_codes_are_not_scaled(tiny):
    """All held-out latents on one code have no variance to divide by."""
    vq = replace(tiny, model=replace(tiny.model, kind="vq", latent_channels=1))
    planned = blueprint(vq, make_mesh(ONE, jax.devices()[:1]))

    def reconstruct(parameters, image):
        latent = jnp.zeros((len(image), 8, 8, 1))
        codes = jnp.zeros((len(image), 8, 8), jnp.int32)
        return Reconstructed(jnp.asarray(image), latent, latent, codes)

    found = measure(planned, reconstruct, None, Judges(), pictures(vq, "held_out")[:5])
    assert found["latent_scale"] == 1.0 and found["codebook_perplexity"] == 1.0
