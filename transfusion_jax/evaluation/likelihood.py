"""Suite `likelihood`: held-out text perplexity, and image loss by timestep."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transfusion_jax.batch import Batch
from transfusion_jax.data.pipeline import Data
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.generation.engine import Engine

BUCKETS = 10
"""Ranges of timesteps, as equal as can be."""
BATCH = 16
"""Rows measured at one time; more where the mesh cuts a batch into more parts."""


def likelihood(engine: Engine, samples: Path, rows: int | None) -> dict:
    """Measures at most `rows` held-out rows, evenly spaced over all of them (None: every row).

    `text_perplexity`: exp of the mean loss over their text targets, images clean; left out where no
    text is held out. `image_loss_by_timestep`: mean squared error of the prediction over their
    images, for each image one timestep drawn from each tenth of the timesteps; keys are
    "first-last", such as "0-99". `likelihood_rows`: the rows measured.
    """
    experiment = engine.experiment
    data = Data(experiment, engine.tokenizer, "held_out")
    edges = bucket_edges(experiment.diffusion.steps)
    losses = _losses(engine, edges)
    text, texts, image_count = 0.0, 0.0, 0.0
    images = np.zeros(len(edges) - 1)
    shards = engine.devices.shards
    for number, batch in enumerate(data.once(-(-BATCH // shards) * shards, rows)):
        engine.moved()
        text_sum, image_sums, weights = losses(batch, number)
        text, images = text + text_sum, images + image_sums
        texts, image_count = texts + weights[0], image_count + weights[1]
    by_timestep = {
        f"{low}-{high - 1}": float(loss / image_count)
        for low, high, loss in zip(edges[:-1], edges[1:], images, strict=True)
        if image_count
    }
    total = sum(len(source) for source in data.sources)
    perplexity = {"text_perplexity": float(np.exp(text / texts))} if texts else {}
    return {
        **perplexity,
        "image_loss_by_timestep": by_timestep,
        "likelihood_rows": total if rows is None else min(rows, total),
    }


def bucket_edges(steps: int) -> list[int]:
    """Bucket i holds the timesteps edges[i] to edges[i + 1] - 1; together, 0 to `steps` - 1."""
    buckets = min(BUCKETS, steps)
    return [steps * i // buckets for i in range(buckets + 1)]


def _losses(
    engine: Engine, edges: Sequence[int]
) -> Callable[[Batch, int], tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Sums over a batch, by its number: text loss with clean images, image loss of every bucket,
    weights."""
    chunk, seed = engine.experiment.train.vocab_chunk, engine.experiment.train.seed

    @jax.jit
    def losses(parameters, batch, number):
        model = nnx.merge(engine.graph, parameters)
        key = jax.random.fold_in(jax.random.key(seed), number)
        noise = jax.random.normal(key, batch.latents_BMhwc.shape)
        clean = jnp.zeros_like(batch.image_start_BM)
        low, high = jnp.asarray(edges[:-1]), jnp.asarray(edges[1:])
        text_BL = model.losses(batch, Noise(clean, jnp.zeros_like(noise)), chunk)["text"]

        def bucket(number):
            key_of_bucket = jax.random.fold_in(key, number)
            t_BM = jax.random.randint(key_of_bucket, clean.shape, low[number], high[number])
            image_BM = model.losses(batch, Noise(t_BM, noise), chunk)["image"]
            return jnp.sum(image_BM * batch.image_weight_BM)

        images = jax.lax.map(bucket, jnp.arange(len(low)))
        weights = batch.text_weight_BL.sum(), batch.image_weight_BM.sum()
        return jnp.sum(text_BL * batch.text_weight_BL), images, weights

    def measured(batch, number):
        batch = engine.devices.put(batch)
        with engine.devices.current():
            sums = losses(engine.parameters, batch, np.uint32(number))
        return engine.devices.host(sums)

    return measured
