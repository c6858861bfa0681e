"""Held-out text perplexity, and image loss by timestep."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transfusion_jax.data.pipeline import Data
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.generation.engine import Engine

BUCKETS = 10
ROWS = 16


def likelihood(engine: Engine) -> dict:
    """`text_perplexity`: exp of the mean loss over all text targets of the held-out rows, images clean.

    Left out where no text is held out.

    `image_loss_by_timestep`: mean squared error of the prediction over all held-out images, one timestep drawn
    per image in each tenth of the timesteps, keyed "0-99", "100-199", ...
    """
    experiment = engine.experiment
    width = experiment.diffusion.steps // BUCKETS

    @jax.jit
    def losses(parameters, batch, key):
        """Sums and counts: text with clean images, then the images of every bucket."""
        model = nnx.merge(engine.graph, parameters)
        noise = jax.random.normal(key, batch.latents_BMhwc.shape)
        clean = jnp.zeros_like(batch.image_start_BM)
        chunk = experiment.train.vocab_chunk
        text_BL = model.losses(batch, Noise(clean, jnp.zeros_like(noise)), chunk)["text"]

        def bucket(number):
            t_BM = width * number + jax.random.randint(
                jax.random.fold_in(key, number), clean.shape, 0, width
            )
            image_BM = model.losses(batch, Noise(t_BM, noise), chunk)["image"]
            return jnp.sum(image_BM * batch.image_weight_BM)

        images = jax.lax.map(bucket, jnp.arange(BUCKETS))
        weights = batch.text_weight_BL.sum(), batch.image_weight_BM.sum()
        return jnp.sum(text_BL * batch.text_weight_BL), images, weights

    text, images, texts, image_count = 0.0, np.zeros(BUCKETS), 0.0, 0.0
    for number, batch in enumerate(Data(experiment, engine.tokenizer, "held_out").once(ROWS)):
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), number)
        text_sum, image_sums, weights = jax.device_get(losses(engine.parameters, batch, key))
        text, images = text + text_sum, images + image_sums
        texts, image_count = texts + weights[0], image_count + weights[1]
    by_timestep = {
        f"{i * width}-{(i + 1) * width - 1}": float(loss / image_count)
        for i, loss in enumerate(images)
        if image_count
    }
    perplexity = {"text_perplexity": float(np.exp(text / texts))} if texts else {}
    return {**perplexity, "image_loss_by_timestep": by_timestep}
