"""Suite `likelihood`: held-out text perplexity, and the loss of images: by timestep where they are
diffused, of a code where they are tokens."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.pipeline import Data
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.generation.engine import Engine

NAMES = ("text", "image")
BUCKETS = 10
"""Ranges of timesteps, as equal as can be."""
BATCH = 16
"""Rows measured at one time; more where the mesh cuts a batch into more parts."""


def likelihood(engine: Engine, samples: Path, rows: int | None) -> dict:
    """Measures at most `rows` held-out rows, evenly spaced over all of them (None: every row).

    `text_perplexity`: exp of the mean loss over their text targets, images clean; left out where no
    text is held out. `likelihood_rows`: the rows measured. And of their images, by what these are
    to the model:

    - latents: `image_loss_by_timestep`, mean squared error of what `diffusion.loss` names, for each
      image one timestep drawn from each tenth of the timesteps; keys are "first-last", such as
      "0-99"; `image_loss`, their mean, where an image is held out;
    - codes: `code_loss`, mean cross-entropy of a code in nats; left out where no image is held out;
    - none: nothing.
    """
    data = Data(engine.experiment, engine.tokenizer, "held_out")
    losses = _losses(engine)
    sums = {name: (0.0, 0.0) for name in NAMES}
    shards = engine.devices.shards
    for number, batch in enumerate(data.once(-(-BATCH // shards) * shards, rows)):
        engine.moved()
        for name, (loss, weight) in losses(batch, number).items():
            sums[name] = sums[name][0] + loss.astype(np.float64), sums[name][1] + float(weight)
    (text, texts), (images, image_weight) = sums["text"], sums["image"]
    total = sum(len(source) for source in data.sources)
    return {
        **({"text_perplexity": float(np.exp(text / texts))} if texts else {}),
        **_image_metrics(engine.experiment, images, image_weight),
        "likelihood_rows": total if rows is None else min(rows, total),
    }


def _image_metrics(experiment: Experiment, losses: np.ndarray | float, weight: float) -> dict:
    """Of the sums over all images."""
    kind = experiment.model.images
    if kind == "none" or (kind == "codes" and not weight):
        return {}
    if kind == "codes":
        return {"code_loss": float(losses / weight)}
    edges = bucket_edges(experiment.diffusion.steps) if weight else []
    means = {
        f"{low}-{high - 1}": float(loss / weight)
        for (low, high), loss in zip(itertools.pairwise(edges), np.atleast_1d(losses), strict=False)
    }
    mean = {"image_loss": sum(means.values()) / len(means)} if means else {}
    return {**mean, "image_loss_by_timestep": means}


def bucket_edges(steps: int) -> list[int]:
    """Bucket i holds the timesteps edges[i] to edges[i + 1] - 1; together, 0 to `steps` - 1."""
    buckets = min(BUCKETS, steps)
    return [steps * i // buckets for i in range(buckets + 1)]


def _losses(
    engine: Engine,
) -> Callable[[Batch, int], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(batch, its number) -> by name, the sum of weighted losses, and of the weights.

    Images are clean, but where they are diffused: then their loss is one of every bucket.
    """
    experiment = engine.experiment
    chunk = experiment.train.vocab_chunk
    edges = jnp.asarray(bucket_edges(experiment.diffusion.steps))
    diffused = experiment.model.images == "latents"

    @jax.jit
    def losses(parameters, batch, number):
        model = nnx.merge(engine.graph, parameters)
        weights = model.weights(batch)
        # Those of a row are its own, whatever the run's seed and the size of a batch.
        B, M, *image = batch.latents_BMhwc.shape
        key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(
            number * B + jnp.arange(B, dtype=number.dtype)
        )
        noise = jax.vmap(lambda key: jax.random.normal(key, (M, *image)))(key_B)
        clean = jnp.zeros_like(batch.image_start_BM)

        def total(name, noise):
            return jnp.sum(model.losses(batch, noise, chunk)[name] * weights[name])

        def bucket(i):
            low, high = edges[i], edges[i + 1]
            t_BM = jax.vmap(
                lambda key: jax.random.randint(jax.random.fold_in(key, i), (M,), low, high)
            )(key_B)
            return total("image", Noise(t_BM, noise))

        without_noise = Noise(clean, jnp.zeros_like(noise))
        sums = {name: total(name, without_noise) for name in NAMES if name in weights}
        if diffused:
            sums["image"] = jax.lax.map(bucket, jnp.arange(len(edges) - 1))
        return {name: (loss, weights[name].sum()) for name, loss in sums.items()}

    def measured(batch, number):
        batch = engine.devices.put(batch)
        with engine.devices.current():
            sums = losses(engine.parameters, batch, np.uint32(number))
        return engine.devices.host(sums)

    return measured
