"""The autoencoder: sizes and shapes, the Gaussian, and the quantiser against brute force."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_cases import SMALL, VQ, images, parameters, run
from flax import nnx, traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from transfusion_jax.autoencoder import quantizer as q
from transfusion_jax.autoencoder.config import AutoencoderConfig, tiny
from transfusion_jax.autoencoder.vae import LAST_KERNEL, Gaussian, abstract_autoencoder, build
from transfusion_jax.config import MeshConfig
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding, parameter_shardings


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
