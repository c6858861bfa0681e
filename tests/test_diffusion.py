import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transfusion_jax.config import DiffusionConfig
from transfusion_jax.diffusion.process import Process, draw_training_noise, process
from transfusion_jax.diffusion.sampler import Sampler, timesteps
from transfusion_jax.diffusion.schedule import Schedule

COSINE = Schedule("cosine", 1000)


def test_cosine_schedule_is_nichol_and_dhariwal():
    """alpha_bar from the closed form, but for the last step, where beta is clipped at 0.999."""
    t = np.arange(1000)
    f = lambda u: np.cos((u / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    alpha_bar = np.asarray(COSINE.alpha(jnp.arange(1000)), np.float64) ** 2
    np.testing.assert_allclose(alpha_bar[:-1], f(t[:-1] + 1) / f(0), rtol=1e-5, atol=1e-9)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1e-3, rel=1e-4)
    assert float(COSINE.alpha(jnp.int32(-1))) == 1 and float(COSINE.sigma(jnp.int32(-1))) == 0


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_noise_grows_and_signal_shrinks(name):
    schedule, t = Schedule(name, 1000), jnp.arange(-1, 1000)
    assert (np.diff(schedule.alpha(t)) < 0).all() and (np.diff(schedule.sigma(t)) >= 0).all()
    if name == "cosine":
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=1e-6)


@pytest.mark.parametrize("config", [("cosine", "epsilon"), ("cosine", "v"), ("flow", "flow")])
def test_the_true_target_gives_back_image_and_noise(config):
    diffusion = process(DiffusionConfig(schedule=config[0], prediction=config[1]))
    clean, noise = jax.random.normal(jax.random.key(0), (2, 6, 5, 4, 4, 2))
    t = jnp.broadcast_to(jnp.asarray([0, 100, 500, 800, 900], jnp.int32), (6, 5))
    x_t = diffusion.corrupt(clean, noise, t)
    got_clean, got_noise = diffusion.split(x_t, diffusion.target(clean, noise, t), t)
    np.testing.assert_allclose(got_clean, clean, atol=1e-4)
    np.testing.assert_allclose(got_noise, noise, atol=1e-4)


def test_ancestral_step_is_the_posterior():
    """eta = 1 draws from q(x_s | x_t, x_0) of Ho et al., equation 7, for any pair of timesteps."""
    sampler = Sampler(Process(COSINE, "epsilon"), steps=10, eta=1.0)
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


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", [("cosine", "epsilon"), ("cosine", "v"), ("flow", "flow")])
def test_sampler_returns_the_data_distribution_for_the_optimal_predictor(eta, kind):
    """For data N(m, C) the best prediction is linear in x_t; with it, samples have mean m and covariance C."""
    mean = jnp.asarray([1.0, -2.0, 0.5])
    root = jnp.asarray([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.3, 0.2, 0.3]])
    covariance = root @ root.T
    schedule = Schedule(kind[0], 1000)
    diffusion = Process(schedule, kind[1])

    def predict(x_t, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * covariance + sigma**2 * jnp.eye(3)
        score = jnp.linalg.solve(total, (x_t - alpha * mean[None]).T).T
        noise = sigma * score
        clean = mean[None] + alpha * score @ covariance
        return diffusion.target(clean, noise, jnp.broadcast_to(t, x_t.shape[:1]))

    key = jax.random.key(0)
    shape = (20_000, 3)
    sampler = Sampler(diffusion, steps=500, eta=eta)
    fresh = lambda i: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    samples = jax.jit(lambda x: sampler.sample(x, predict, fresh))(
        jax.random.normal(jax.random.key(1), shape)
    )
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.04)


def test_timesteps_end_at_the_clean_image():
    np.testing.assert_array_equal(timesteps(1000, 4), [999, 749, 499, 249, -1])
    np.testing.assert_array_equal(timesteps(1000, 1000), np.arange(999, -2, -1))


def test_training_noise_is_standard_and_keeps_the_limit():
    limit = jnp.broadcast_to(jnp.asarray([500, 1000], jnp.int32), (400, 2))
    latents = jnp.zeros((400, 2, 4, 4, 1))
    t, noise = draw_training_noise(jax.random.key(0), limit, latents)
    assert t.min() >= 0 and 480 <= t[:, 0].max() < 500 and 960 <= t[:, 1].max() < 1000
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    again, _ = draw_training_noise(jax.random.key(0), limit[:7], latents[:7])
    np.testing.assert_array_equal(again, t[:7])  # a row's draws do not depend on the rows around it
