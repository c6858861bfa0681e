import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packings
import pytest
from flax import nnx

from transfusion_jax.config import (
    DiffusionConfig,
    Experiment,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.build import build
from transfusion_jax.model.interface import Model
from transfusion_jax.model.losses import image_loss, token_losses
from transfusion_jax.parallel.gathers import on_rows
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.planning.plan import abstract_batch
from transfusion_jax.pretraining.objective import batch_losses
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step


@pytest.mark.parametrize("chunk", [1, 7, 36, 100])
def test_chunked_text_loss_equals_cross_entropy(chunk):
    hidden = jax.random.normal(jax.random.key(0), (3, 36, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 50))
    target = jax.random.randint(jax.random.key(2), (3, 36), 0, 50)
    ones = jnp.ones((3, 36))

    def ours(hidden, kernel):
        return token_losses(hidden, target, ones, kernel, chunk).cross_entropy_BL

    def whole(hidden, kernel):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, target)

    np.testing.assert_allclose(ours(hidden, kernel), whole(hidden, kernel), rtol=1e-5, atol=1e-6)
    gradients = [
        jax.grad(lambda *a, f=f: f(*a).sum(), (0, 1))(hidden, kernel) for f in (ours, whole)
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_positions_without_a_weight_have_no_loss_and_no_logits(chunk):
    """Their hidden states are NaN here, and as many have a weight as fill chunks: one NaN in the
    kernel's gradient and some logits of theirs were computed."""
    hidden = jax.random.normal(jax.random.key(0), (3, 36, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 50))
    target = jax.random.randint(jax.random.key(2), (3, 36), 0, 50)
    places = np.random.default_rng(0).permutation(3 * 36)[: 6 * chunk]
    values = jnp.asarray(np.resize([0.2, -1.0], len(places)), jnp.float32)
    weight = jnp.zeros(3 * 36).at[places].set(values).reshape(3, 36)

    def ours(hidden, kernel):
        found = token_losses(hidden, target, weight, kernel, chunk)
        return jnp.sum(found.cross_entropy_BL * weight + jnp.square(found.log_z_BL) * weight), found

    def whole(hidden, kernel):
        logits = hidden @ kernel
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return jnp.sum(weight * (loss + jnp.square(jax.nn.logsumexp(logits, axis=-1)))), loss

    unread = jnp.where(weight[..., None] != 0, hidden, jnp.nan)
    (got, found), of_hidden = jax.value_and_grad(ours, has_aux=True)(unread, kernel)
    (expected, loss), of_all_hidden = jax.value_and_grad(whole, has_aux=True)(hidden, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(
        found.cross_entropy_BL, jnp.where(weight != 0, loss, 0.0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(of_hidden, of_all_hidden, rtol=1e-4, atol=1e-5)
    of_kernel = jax.grad(ours, 1, has_aux=True)(unread, kernel)[0]
    np.testing.assert_allclose(
        of_kernel, jax.grad(whole, 1, has_aux=True)(hidden, kernel)[0], rtol=1e-4, atol=1e-4
    )


def test_each_device_makes_the_logits_of_its_own_targets():
    """As above, with rows over four devices, each of which has targets for one chunk of two."""
    hidden = jnp.where(jnp.arange(8)[None, :, None] % 2 == 0, jnp.ones((8, 8, 4)), jnp.nan)
    weight = jnp.where(jnp.isnan(hidden[..., 0]), 0.0, 1.0)
    kernel = nnx.Param(jnp.ones((4, 16)), out_sharding=("embed", "vocab"), eager_sharding=False)

    def loss(kernel, hidden):
        def local(kernel_DV, *rows):
            return token_losses(*rows, kernel_DV, 4).cross_entropy_BL

        target = jnp.zeros(weight.shape, jnp.int32)
        return on_rows(local, kernel, jnp.float32, hidden, target, weight).sum()

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])):
        gradient = jax.jit(jax.grad(loss))(kernel, hidden)
    assert np.isfinite(gradient[...]).all()


class Known(Model):
    """A model of known losses: 1e9 where nothing may count."""

    def __init__(self, text, image, batch):
        self.text, self.image = text, image
        self.text = jnp.where(batch.text_weight_BL > 0, text, 1e9)
        self.image = jnp.where(batch.image_weight_BM > 0, image, 1e9)

    def losses(self, batch, noise, vocab_chunk):
        return {"text": self.text, "image": self.image}

    def weights(self, batch):
        return {"text": batch.text_weight_BL, "image": batch.image_weight_BM}

    def coefficients(self, train):
        return {"text": 1.0, "image": train.image_loss_weight}


NO_NOISE = Noise(jnp.zeros((1, 6), jnp.int32), jnp.zeros((1, 6, 4, 4, 1)))


def losses_of(text, image, microbatch, batch):
    losses = batch_losses(
        Known(text, image, microbatch), microbatch, batch, NO_NOISE, TrainConfig()
    )
    return float(losses.text), float(losses.image), float(losses.total)


def test_total_is_lambda_weighted_and_ignores_what_has_no_weight():
    batch = jax.tree.map(jnp.asarray, packings.batch(["tIt", "ttt|t"]))
    assert losses_of(2.0, 3.0, batch, batch) == (2.0, 3.0, 17.0)


def test_a_microbatch_has_its_share_of_the_batch():
    """One of the batch's two images, two of its six text targets."""
    batch = jax.tree.map(jnp.asarray, packings.batch(["tIt", "ttI|tt"]))
    first = jax.tree.map(lambda x: x[:1], batch)
    text, image, total = losses_of(3.0, 4.0, first, batch)
    assert (text, image) == (pytest.approx(3 * 2 / 6), 4 / 2) and total == pytest.approx(1 + 5 * 2)


def test_no_images_and_no_text_are_loss_zero():
    batch = jax.tree.map(jnp.asarray, packings.batch([""]))
    assert losses_of(1.0, 1.0, batch, batch) == (0.0, 0.0, 0.0)


def test_image_loss_is_a_mean_over_elements():
    zeros = jnp.zeros((2, 3, 4, 4, 2))
    np.testing.assert_allclose(
        image_loss(zeros + 2, zeros, jnp.full((2, 3), 0.5)), np.full((2, 3), 2.0)
    )


@pytest.mark.parametrize("loss", ["prediction", "x"])
def test_the_losses_of_a_model_are_those_of_its_predictions(loss):
    """Every image has its own timestep: the corrupted image goes in, and the noise is the target.
    An error of x is sigma / alpha times that of the noise."""
    config = ModelConfig(
        layers=1, width=32, heads=2, mlp_width=48, vocab_size=32, compute_dtype="float32"
    )
    diffusion = DiffusionConfig(loss=loss)
    image = ImageConfig(4, 4, 1, 2)
    model = build(Experiment("test", image=image, model=config, diffusion=diffusion), 0)
    shape = model.patches.out_DZ.shape
    model.patches.out_DZ[...] = 0.1 * jax.random.normal(jax.random.key(1), shape)
    batch = jax.tree.map(jnp.asarray, packings.batch(["tItIt", "ttt|It"]))
    t = jnp.asarray(np.random.default_rng(0).integers(100, 900, batch.image_start_BM.shape))
    noise = jax.random.normal(jax.random.key(2), batch.latents_BMhwc.shape)
    u = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    alpha_bar = (np.cos(u) ** 2 / np.cos(u[0]) ** 2)[np.asarray(t) + 1][..., None, None, None]
    noisy = np.sqrt(alpha_bar) * batch.latents_BMhwc + np.sqrt(1 - alpha_bar) * noise
    hidden, predicted = model(batch, noisy.astype(jnp.float32), t)
    losses = model.losses(batch, Noise(t, noise), 36)
    expected = np.mean(np.square(np.asarray(predicted) - np.asarray(noise)), axis=(2, 3, 4))
    if loss == "x":
        expected = expected * (1 / alpha_bar - 1)[..., 0, 0, 0]
    real = np.asarray(batch.image_weight_BM) > 0
    assert real.sum() == 3
    np.testing.assert_allclose(losses["image"][real], expected[real], rtol=1e-4)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        hidden @ model.output_DV[...], batch.text_target_BL
    )
    has_target = batch.text_weight_BL > 0
    np.testing.assert_allclose(losses["text"], jnp.where(has_target, cross_entropy, 0.0), rtol=1e-4)


def bfloat16_case():
    """Hidden states and a kernel whose logits are about as large as those of a trained model."""
    hidden = jax.random.normal(jax.random.key(0), (4, 64, 128)).astype(jnp.bfloat16)
    kernel = 0.5 * jax.random.normal(jax.random.key(1), (128, 1000))
    target = jax.random.randint(jax.random.key(2), (4, 64), 0, 1000)
    return hidden, kernel, target


def of_tokens(hidden, kernel, target):
    losses = token_losses(hidden, target, jnp.ones(target.shape), kernel, 16)
    return losses.cross_entropy_BL


def exact_losses(hidden, kernel, target):
    """From the same rounded factors, with sums and logits in float32."""
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(
        hidden.astype(jnp.float32) @ rounded, target
    )


def test_bfloat16_models_have_the_loss_of_float32_logits():
    """To 1e-3 nats for every token, where rounded logits would be off by a hundredth."""
    hidden, kernel, target = bfloat16_case()
    got = of_tokens(hidden, kernel, target)
    np.testing.assert_allclose(got, exact_losses(hidden, kernel, target), atol=1e-3)


def test_gradients_through_float32_logits_are_those_of_the_exact_loss():
    """But for one rounding to bfloat16 of the gradient at the logits; the kernel's stays
    float32."""
    hidden, kernel, target = bfloat16_case()

    def ours(hidden, kernel):
        return of_tokens(hidden, kernel, target).sum()

    got = jax.grad(ours, (0, 1))(hidden, kernel)
    expected = jax.grad(lambda *x: exact_losses(*x, target).sum(), (0, 1))(
        hidden.astype(jnp.float32), kernel
    )
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    for gradient, reference in zip(got, expected, strict=True):
        apart = np.abs(np.asarray(gradient, np.float32) - np.asarray(reference))
        assert apart.max() < 2**-7 * np.abs(reference).max()
        assert np.sqrt(np.mean(apart**2)) < 2**-8 * np.sqrt(np.mean(np.square(reference)))


def test_no_product_of_a_bfloat16_step_gives_bfloat16_logits(experiment):
    """Of all products in the step, as lowered, those whose result ends in V give float32."""
    mesh_config = MeshConfig(data=1)
    small = replace(
        experiment, mesh=mesh_config, model=replace(experiment.model, compute_dtype="bfloat16")
    )
    mesh = make_mesh(mesh_config, jax.devices()[:1])
    planned = blueprint(small, mesh)
    with jax.set_mesh(mesh):
        lowered = compiled_step(planned).lower(planned.abstract, abstract_batch(small, mesh))
    products = re.findall(r"dot_general.*-> tensor<([\dx]+)x(\w+)>", lowered.as_text())
    kinds = {kind for shape, kind in products if shape.split("x")[-1] == "512"}
    assert small.model.vocab_size == 512 and kinds == {"f32"}
    assert ("bf16" in {kind for _, kind in products}) and len(products) > 20
