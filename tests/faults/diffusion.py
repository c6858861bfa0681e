"""Faults of diffusion: schedules, corruption, targets, training noise, samplers."""

from faults.fault import Fault

FAULTS = (
    Fault(
        "cosine without its offset",
        "diffusion/schedule.py",
        "np.cos((u + 0.008) / 1.008 * np.pi / 2)",
        "np.cos(u * np.pi / 2)",
        "diffusion",
    ),
    Fault(
        "beta not capped",
        "diffusion/schedule.py",
        "np.minimum(1.0 - f[1:] / f[:-1], 0.999)",
        "1.0 - f[1:] / f[:-1]",
        "diffusion",
    ),
    Fault(
        "sigma is a variance",
        "diffusion/schedule.py",
        "np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar)",
        "np.sqrt(alpha_bar), 1.0 - alpha_bar",
        "diffusion",
    ),
    Fault(
        "alpha of the timestep before",
        "diffusion/schedule.py",
        "jnp.asarray(self.table()[0].astype(np.float32))[t + 1]",
        "jnp.asarray(self.table()[0].astype(np.float32))[t]",
        "diffusion",
    ),
    Fault(
        "flow reversed",
        "diffusion/schedule.py",
        "return 1.0 - u, u",
        "return u, 1.0 - u",
        "diffusion",
    ),
    Fault(
        "noise and clean swapped in the target",
        "diffusion/process.py",
        "self.prediction.target(clean, noise, ",
        "self.prediction.target(noise, clean, ",
        "diffusion reference",
    ),
    Fault(
        "v target adds",
        "diffusion/prediction.py",
        "return alpha * noise - sigma * clean",
        "return alpha * noise + sigma * clean",
        "diffusion",
    ),
    Fault(
        "velocity divides by squares",
        "diffusion/prediction.py",
        "        n = alpha + sigma\n",
        "        n = alpha**2 + sigma**2\n",
        "diffusion",
    ),
    Fault(
        "timesteps reach the limit",
        "diffusion/process.py",
        "jax.random.randint(t_key, limit_M.shape, 0, limit_M)",
        "jax.random.randint(t_key, limit_M.shape, 0, limit_M + 1)",
        "diffusion::test_training_noise_is_standard_and_keeps_the_limit",
    ),
    Fault(
        "all rows draw the same noise",
        "diffusion/process.py",
        "jax.random.split(jax.random.fold_in(key, b))",
        "jax.random.split(key)",
        "diffusion::test_training_noise_is_standard_and_keeps_the_limit",
    ),
    Fault(
        "all images of a row draw the same noise",
        "diffusion/process.py",
        "jax.random.normal(noise_key, latents_Mhwc.shape, jnp.float32)",
        "jnp.broadcast_to(\n"
        "            jax.random.normal(noise_key, latents_Mhwc.shape[1:]), latents_Mhwc.shape\n"
        "        )",
        "diffusion::test_each_image_has_its_own_training_noise",
    ),
    Fault(
        "noise not recomputed after clipping",
        "diffusion/sampler.py",
        "noise = (x_t - alpha_t * clean) / sigma_t",
        "pass",
        "diffusion::test_a_clipped_image_has_the_noise_that_leads_to_it",
    ),
    Fault(
        "ancestral noise too large",
        "diffusion/sampler.py",
        "1.0 - ratio**2, 0.0",
        "1.0 - ratio**4, 0.0",
        "diffusion::test_ancestral_step_is_the_posterior",
    ),
    Fault(
        "fresh noise comes on top",
        "diffusion/sampler.py",
        "sigma_s**2 - c**2, 0.0",
        "sigma_s**2, 0.0",
        "diffusion::test_ancestral_step_is_the_posterior",
    ),
    Fault(
        "sampling ends at timestep 0",
        "diffusion/sampler.py",
        "np.linspace(training_steps - 1, -1, sampling_steps + 1)",
        "np.linspace(training_steps - 1, 0, sampling_steps + 1)",
        "diffusion::test_timesteps_end_at_the_clean_image",
    ),
    Fault(
        "ddim and ddpm swapped",
        "diffusion/sampler.py",
        '{"ddim": 0.0, "ddpm": 1.0}',
        '{"ddim": 1.0, "ddpm": 0.0}',
        "diffusion generation",
    ),
)
