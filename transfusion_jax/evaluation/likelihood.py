"""Suite `likelihood`: held-out text perplexity, and the loss of images: by timestep where they are
diffused, of a code where they are tokens."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.pipeline import Data
from transfusion_jax.generation.engine import Engine
from transfusion_jax.pretraining.validation import Draw, Sums, Totals, row_sums

BUCKETS = 10
"""Ranges of timesteps, as equal as can be."""
BATCH = 16
"""Rows measured at one time; more where the mesh cuts a batch into more parts."""


def likelihood(engine: Engine, samples: Path, rows: int | None) -> dict:
    """Measures at most `rows` held-out rows, evenly spaced over all of them (None: every row).

    `text_perplexity`: exp of the mean loss over their text targets, images clean and seen as
    generation shows finished ones; left out where no text is held out. `likelihood_rows`: the rows
    measured. And of their images, by what these are to the model:

    - latents: `image_loss_by_timestep`, mean squared error of what `diffusion.loss` names, for each
      image one timestep drawn from each tenth of the timesteps, which counts where it is below the
      image's noise limit; keys are "first-last", such as "0-99"; `image_loss`, their mean, where an
      image is held out;
    - codes: `code_loss`, mean cross-entropy of a code in nats; left out where no image is held out;
    - none: nothing.
    """
    data = Data(engine.experiment, engine.tokenizer, "held_out")
    losses, totals, shards = row_losses(engine), Totals(), engine.devices.shards
    size = -(-BATCH // shards) * shards
    for batch, number_B2 in data.numbered(size, range(len(data.sources)), rows):
        engine.moved()
        totals.add(losses(batch, number_B2))
    means = totals.means()
    text, images = (means.get(name, {}) for name in ("text", "image"))
    total = sum(len(source) for source in data.sources)
    return {
        **({"text_perplexity": float(np.exp(text[0]))} if text else {}),
        **_image_metrics(engine.experiment, images),
        "likelihood_rows": total if rows is None else min(rows, total),
    }


def _image_metrics(experiment: Experiment, means: dict[int, float]) -> dict:
    """Of the mean losses of every time that images were measured."""
    kind = experiment.model.images
    if kind == "none" or (kind == "codes" and not means):
        return {}
    if kind == "codes":
        return {"code_loss": means[0]}
    edges = bucket_edges(experiment.diffusion.steps)
    found = {f"{edges[i]}-{edges[i + 1] - 1}": mean for i, mean in means.items()}
    mean = {"image_loss": sum(found.values()) / len(found)} if found else {}
    return {**mean, "image_loss_by_timestep": found}


def bucket_edges(steps: int) -> list[int]:
    """Bucket i holds the timesteps edges[i] to edges[i + 1] - 1; together, 0 to `steps` - 1."""
    buckets = min(BUCKETS, steps)
    return [steps * i // buckets for i in range(buckets + 1)]


def draw_in(edges: list[int]) -> Draw:
    """One timestep of every range for each image, and the same noise in all."""

    def draw(key: Array, i: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        low, high = jnp.asarray(edges)[i], jnp.asarray(edges)[i + 1]
        t_M = jax.random.randint(jax.random.fold_in(key, i), shape[:1], low, high)
        return t_M, jax.random.normal(key, shape)

    return draw


def row_losses(engine: Engine) -> Callable[[Batch, np.ndarray], Sums]:
    """(batch, numbers of its rows) -> sums of rows."""
    edges = bucket_edges(engine.experiment.diffusion.steps)
    sums = jax.jit(row_sums(engine.experiment, engine.graph, draw_in(edges), len(edges) - 1))

    def measured(batch: Batch, number_B2: np.ndarray) -> Sums:
        placed = engine.devices.put((batch, number_B2))
        with engine.devices.current():
            found = sums(engine.parameters, *placed)
        return engine.devices.host(found)

    return measured
