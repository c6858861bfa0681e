import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfusion_jax.config import DiffusionConfig, SamplerConfig
from transfusion_jax.diffusion.prediction import PREDICTIONS, Epsilon
from transfusion_jax.diffusion.process import Process, draw_training_noise, process
from transfusion_jax.diffusion.sampler import Sampler, sampler, timesteps
from transfusion_jax.diffusion.schedule import SCHEDULES, Cosine, Flow, Linear

COSINE = Cosine(1000)
PAIRS = list(itertools.product(SCHEDULES, PREDICTIONS))


@pytest.mark.parametrize(
    "field, registry",
    [
        ("schedule", SCHEDULES),
        ("prediction", PREDICTIONS),
        ("loss", ("prediction", "min_snr", *PREDICTIONS)),
    ],
    ids=str,
)
def test_the_config_names_what_there_is(field, registry):
    """The config cannot import the registries, which need jax, so it repeats their names."""
    names = typing.get_args(typing.get_type_hints(DiffusionConfig)[field])
    assert set(names) == set(registry)


def test_cosine_schedule_is_nichol_and_dhariwal():
    """alpha_bar from the closed form, but for the last step, where beta is clipped at 0.999."""

    def f(u):
        return np.cos((u / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2

    t = np.arange(1000)
    alpha_bar = np.asarray(COSINE.alpha(jnp.arange(1000)), np.float64) ** 2
    np.testing.assert_allclose(alpha_bar[:-1], f(t[:-1] + 1) / f(0), rtol=1e-5, atol=1e-9)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3, rel=1e-4)


def test_flow_schedule_is_a_straight_line():
    t = np.arange(1000)
    np.testing.assert_allclose(Flow(1000).alpha(jnp.asarray(t)), 1 - (t + 1) / 1000, atol=1e-7)
    np.testing.assert_allclose(Flow(1000).sigma(jnp.asarray(t)), (t + 1) / 1000, atol=1e-7)


def test_linear_schedule_is_ho_et_al():
    """alpha_bar_t = prod (1 - beta_s), added up in logarithms; T = 100 spans the same noise."""
    beta = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    expected = np.exp(0.5 * np.cumsum(np.log1p(-beta)))
    np.testing.assert_allclose(Linear(1000).alpha(jnp.arange(1000)), expected, rtol=1e-5)
    assert float(Linear(1000).alpha(jnp.int32(999))) == pytest.approx(0.00635, rel=0.01)
    assert float(Linear(100).alpha(jnp.int32(99))) == pytest.approx(0.0047, rel=0.05)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [0.25, 9.0])
def test_a_scaled_schedule_has_scaled_signal_to_noise_ratios(name, scale):
    t = jnp.arange(0, 990)
    plain, scaled = SCHEDULES[name](1000), SCHEDULES[name](1000, scale)
    ratio = [np.square(np.asarray(s.alpha(t), np.float64) / s.sigma(t)) for s in (plain, scaled)]
    np.testing.assert_allclose(ratio[1], scale * ratio[0], rtol=1e-4)
    order = 1 if name == "flow" else 2
    np.testing.assert_allclose(scaled.alpha(t) ** order + scaled.sigma(t) ** order, 1, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows_and_signal_shrinks(name, scale):
    schedule, t = SCHEDULES[name](1000, scale), jnp.arange(-1, 1000)
    assert (np.diff(schedule.alpha(t)) < 0).all() and (np.diff(schedule.sigma(t)) >= 0).all()
    assert float(schedule.alpha(jnp.int32(-1))) == 1 and float(schedule.sigma(jnp.int32(-1))) == 0
    if name != "flow":
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=1e-6)


TARGETS = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
    "x": lambda clean, noise, alpha, sigma: clean,
}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_corruption_and_target_are_their_equations(pair):
    """Numbers that tell the image from the noise, and one timestep from another."""
    diffusion, schedule = process(DiffusionConfig(pair[0], 1000, pair[1])), SCHEDULES[pair[0]](1000)
    clean = jnp.full((2, 3, 1, 1, 1), 2.0)
    noise = jnp.full((2, 3, 1, 1, 1), -5.0)
    t = jnp.asarray([[0, 300, 998], [10, 500, 700]], jnp.int32)
    alpha, sigma = (
        np.asarray(x)[..., None, None, None] for x in (schedule.alpha(t), schedule.sigma(t))
    )
    np.testing.assert_allclose(diffusion.corrupt(clean, noise, t), alpha * 2 - sigma * 5, rtol=1e-5)
    expected = TARGETS[pair[1]](clean, noise, alpha, sigma)
    np.testing.assert_allclose(diffusion.target(clean, noise, t), expected, rtol=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_true_target_gives_back_image_and_noise(pair):
    """For every pair of names: x_t and the target are two equations, which `split` solves."""
    diffusion = process(DiffusionConfig(schedule=pair[0], prediction=pair[1]))
    clean, noise = jax.random.normal(jax.random.key(0), (2, 6, 5, 4, 4, 2))
    t = jnp.broadcast_to(jnp.asarray([0, 100, 500, 800, 900], jnp.int32), (6, 5))
    x_t = diffusion.corrupt(clean, noise, t)
    got_clean, got_noise = diffusion.split(x_t, diffusion.target(clean, noise, t), t)
    np.testing.assert_allclose(got_clean, clean, atol=1e-4)
    np.testing.assert_allclose(got_noise, noise, atol=1e-4)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("loss", TARGETS)
def test_a_loss_is_the_error_of_what_it_names(pair, loss):
    """The weighted error of any prediction is the error of `loss` computed from that prediction."""
    diffusion = process(DiffusionConfig(pair[0], 1000, pair[1], loss))
    schedule = SCHEDULES[pair[0]](1000)
    t = jnp.asarray([60, 200, 400, 600, 700], jnp.int32)  # alpha and sigma above their least
    clean, noise, error = jax.random.normal(jax.random.key(0), (3, 5, 4, 4, 2))
    x_t = diffusion.corrupt(clean, noise, t)
    target = diffusion.target(clean, noise, t)
    predicted = target + 0.1 * error
    coefficients = (
        np.asarray(x)[:, None, None, None] for x in (schedule.alpha(t), schedule.sigma(t))
    )
    alpha, sigma = coefficients
    of_truth = TARGETS[loss](clean, noise, alpha, sigma)
    of_prediction = TARGETS[loss](*diffusion.split(x_t, predicted, t), alpha, sigma)
    expected = np.square(of_prediction - of_truth).mean((1, 2, 3))
    got = diffusion.loss_weight(t) * np.square(predicted - target).mean((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_image_can_be_seen_clean_at_any_timestep(name):
    diffusion = process(DiffusionConfig(schedule=name))
    clean, t = jax.random.normal(jax.random.key(0), (1000, 2, 3, 1)), jnp.arange(1000)
    seen = diffusion.corrupt(clean, diffusion.unnoticed(clean, t), t)
    np.testing.assert_allclose(seen, clean, atol=2e-6)


def test_a_loss_of_the_prediction_itself_is_not_weighted():
    for name in PREDICTIONS:
        diffusion = process(DiffusionConfig("cosine", 1000, name))
        np.testing.assert_array_equal(diffusion.loss_weight(jnp.arange(1000)), 1.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_those_of_hang_et_al(prediction):
    """Section 3.4: min(SNR, gamma) for x, over SNR for epsilon, over SNR + 1 for v."""
    diffusion = process(DiffusionConfig("cosine", 1000, prediction, "min_snr", min_snr_gamma=3.0))
    t = jnp.arange(40, 960)
    snr = np.square(np.asarray(COSINE.alpha(t), np.float64) / COSINE.sigma(t))
    flow = np.square(1 + np.sqrt(snr))  # u = epsilon - x_0: error (1 + alpha / sigma) times of x_0
    divisor = {"x": 1, "epsilon": snr, "v": snr + 1, "flow": flow}[prediction]
    np.testing.assert_allclose(diffusion.loss_weight(t), np.minimum(snr, 3) / divisor, rtol=1e-3)


@pytest.mark.parametrize("loss", ["min_snr", *PREDICTIONS])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_loss_weights_are_finite_at_every_timestep(pair, loss):
    """LEAST bounds what they divide by: at most 1 / 0.05, squared, twice that for a flow."""
    weight = process(DiffusionConfig(pair[0], 1000, pair[1], loss)).loss_weight(jnp.arange(1000))
    assert np.isfinite(weight).all() and (weight > 0).all() and (weight < 1000).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_last_timestep_gives_numbers(pair):
    """Under `flow` it is pure noise: epsilon says nothing of the image, which is taken for its
    mean, 0."""
    diffusion = process(DiffusionConfig(schedule=pair[0], prediction=pair[1]))
    x_t = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    t = jnp.full((3,), 999, jnp.int32)
    clean, noise = diffusion.split(x_t, x_t, t)
    assert np.isfinite(clean).all() and np.isfinite(noise).all()
    if pair == ("flow", "epsilon"):
        np.testing.assert_array_equal(clean, 0)
        np.testing.assert_array_equal(noise, x_t)


def test_ancestral_step_is_the_posterior():
    """eta = 1 draws from q(x_s | x_t, x_0) of Ho et al., equation 7, for any pair of timesteps."""
    sampler = Sampler(Process(COSINE, Epsilon()), steps=10, eta=1.0)
    t, s = jnp.int32(600), jnp.int32(437)
    x_t, epsilon = jax.random.normal(jax.random.key(0), (2, 1000))
    a_t, s_t, a_s, s_s = (
        float(x) for x in (COSINE.alpha(t), COSINE.sigma(t), COSINE.alpha(s), COSINE.sigma(s))
    )
    clean = (x_t - s_t * epsilon) / a_t
    between = s_t**2 - (a_t / a_s) ** 2 * s_s**2  # variance of q(x_t | x_s)
    mean = (a_t / a_s * s_s**2 * x_t + a_s * between * clean) / s_t**2
    zero = jnp.zeros_like(x_t)
    np.testing.assert_allclose(sampler.step(x_t, epsilon, t, s, zero), mean, rtol=1e-3, atol=1e-4)
    spread = sampler.step(x_t, epsilon, t, s, zero + 1) - sampler.step(x_t, epsilon, t, s, zero)
    np.testing.assert_allclose(spread, np.sqrt(between) * s_s / s_t, rtol=1e-3)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_clipped_image_has_the_noise_that_leads_to_it(pair):
    """DDIM with a clip: x_s lies on the line from x_t to the clipped x_0, and epsilon is what is
    left of x_t."""
    diffusion, schedule = process(DiffusionConfig(pair[0], 1000, pair[1])), SCHEDULES[pair[0]](1000)
    sampler = Sampler(diffusion, steps=10, eta=0.0, clip=0.5)
    clean = jnp.asarray([[0.2], [-0.3], [2.0], [-7.0]])
    noise = jnp.asarray([[1.0], [-1.0], [0.5], [0.1]])
    t, s = jnp.int32(600), jnp.int32(300)
    t_B = jnp.full((4,), t)
    x_t = diffusion.corrupt(clean, noise, t_B)
    a_t, s_t = float(schedule.alpha(t)), float(schedule.sigma(t))
    a_s, s_s = float(schedule.alpha(s)), float(schedule.sigma(s))
    clipped = np.asarray([[0.2], [-0.3], [0.5], [-0.5]])
    expected = a_s * clipped + s_s * (np.asarray(x_t) - a_t * clipped) / s_t
    got = sampler.step(x_t, diffusion.target(clean, noise, t_B), t, s, jnp.zeros_like(x_t))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "pair",
    [
        ("cosine", "epsilon"),
        ("cosine", "v"),
        ("cosine", "x"),
        ("flow", "flow"),
        ("flow", "epsilon"),
    ],
    ids=str,
)
def test_sampler_returns_the_data_distribution_for_the_optimal_predictor(eta, pair):
    """For data N(m, C) the best prediction is linear in x_t; with it, samples have mean m and
    covariance C."""
    mean = jnp.asarray([1.0, -2.0, 0.5])
    root = jnp.asarray([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.3]])
    covariance = root @ root.T
    schedule = SCHEDULES[pair[0]](1000)
    diffusion = Process(schedule, PREDICTIONS[pair[1]])

    def predict(x_t, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * covariance + sigma**2 * jnp.eye(3)
        score = (x_t - alpha * mean[None]) @ jnp.linalg.inv(total)
        noise = sigma * score
        clean = mean[None] + alpha * score @ covariance
        return diffusion.target(clean, noise, jnp.broadcast_to(t, x_t.shape[:1]))

    # Drawn by NumPy, which is quick at it.
    rng, steps, shape = np.random.default_rng(0), 500, (5_000, 3)
    fresh = rng.standard_normal((steps, *shape), np.float32)
    sampler = Sampler(diffusion, steps=steps, eta=eta)
    samples = jax.jit(lambda x, fresh: sampler.sample(x, predict, lambda i: fresh[i]))(
        rng.standard_normal(shape, np.float32), fresh
    )
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.04)


def test_ddim_adds_no_noise_and_ddpm_adds_all():
    made = {
        kind: sampler(SamplerConfig(kind=kind, steps=7), Process(COSINE, Epsilon()))
        for kind in ("ddim", "ddpm")
    }
    assert (made["ddim"].eta, made["ddpm"].eta) == (0.0, 1.0)
    assert made["ddim"].steps == 7


def test_timesteps_end_at_the_clean_image():
    np.testing.assert_array_equal(timesteps(1000, 4), [999, 749, 499, 249, -1])
    np.testing.assert_array_equal(timesteps(1000, 1000), np.arange(999, -2, -1))


def test_training_noise_is_standard_and_keeps_the_limit():
    limit = jnp.broadcast_to(jnp.asarray([500, 1000], jnp.int32), (400, 2))
    latents = jnp.zeros((400, 2, 4, 4, 1))
    t, noise = draw_training_noise(jax.random.key(0), limit, latents)
    assert t.min() >= 0 and 480 <= t[:, 0].max() < 500 and 960 <= t[:, 1].max() < 1000
    assert abs(float(t[:, 1].mean()) - 499.5) < 60  # six standard errors of the mean are 87
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    again, _ = draw_training_noise(jax.random.key(0), limit[:7], latents[:7])
    np.testing.assert_array_equal(again, t[:7])  # a row's draws do not depend on the rows around it


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.8), (-1.0, 0.3), (0.0, 1.0)])
def test_logits_of_timesteps_are_normal(mean, std):
    count = 4000
    limit = jnp.broadcast_to(jnp.asarray([500, 1000, 1], jnp.int32), (count, 3))
    config = DiffusionConfig(timesteps="logit_normal", timestep_mean=mean, timestep_std=std)
    t, _ = draw_training_noise(jax.random.key(0), limit, jnp.zeros((count, 3, 1, 1, 1)), config)
    assert t.dtype == jnp.int32 and t.min() >= 0 and not t[:, 2].any()
    for slot, most in enumerate((500, 1000)):
        share = (np.asarray(t[:, slot]) + 0.5) / most
        logits = np.sort(np.log(share / (1 - share)))
        assert abs(logits.mean() - mean) < 5 * std / np.sqrt(count)
        assert abs(logits.std() - std) < 5 * std / np.sqrt(2 * count)
        middle = logits[count // 4 : 3 * count // 4]  # the middle half of a normal distribution
        assert middle[-1] - middle[0] == pytest.approx(2 * 0.6745 * std, rel=0.1)
    far = DiffusionConfig(timesteps="logit_normal", timestep_mean=50.0)
    t, _ = draw_training_noise(jax.random.key(0), limit, jnp.zeros((count, 3, 1, 1, 1)), far)
    np.testing.assert_array_equal(t, limit - 1)


def test_each_image_has_its_own_training_noise():
    """Rows, slots and keys draw apart from each other; of 1,000 timesteps, few of 1,600 are drawn
    for all slots alike."""
    limit = jnp.full((400, 4), 1000, jnp.int32)
    latents = jnp.zeros((400, 4, 4, 4, 1))
    t, noise = draw_training_noise(jax.random.key(0), limit, latents)
    assert len(np.unique(t)) > 700  # 1,600 draws of 1,000: 798 are expected
    for apart in (noise[0] - noise[1], noise[:, 0] - noise[:, 1]):
        assert float(jnp.abs(apart).min(axis=(-3, -2, -1)).max()) > 0
        assert float(apart.std()) == pytest.approx(np.sqrt(2), rel=0.2)
    flat = np.asarray(noise).reshape(1600, 16)
    assert np.abs(np.corrcoef(flat.T) - np.eye(16)).max() < 0.15
    other_t, other_noise = draw_training_noise(jax.random.key(1), limit, latents)
    assert (np.asarray(t) == np.asarray(other_t)).mean() < 0.05
    assert float(jnp.abs(noise - other_noise).min(axis=(-3, -2, -1)).max()) > 0
