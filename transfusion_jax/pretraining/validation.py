"""Validation: the losses of the averaged weights on held-out rows, while a run trains.

The rows of a source are evenly spaced over all its held-out ones. What is drawn for row r of source
n (captions, latents, noise) comes from (n, r) alone: runs of the same data are measured on the same
numbers, whatever their seed, mesh and batch, at every step. Text is measured with clean images, as
in the suite `likelihood`, and so are codes; an image that is diffused at the middles of eight equal
ranges of timesteps, with noise of its own at each.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import Data, PlannedSource, stack
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.errors import require
from transfusion_jax.parallel.rules import batch_sharding, replicated
from transfusion_jax.pretraining.state import Blueprint
from transfusion_jax.training.observation import Moved, Observation, Observer

TIMESTEPS = 8
NAMES = ("text", "image")
Sums = dict[str, tuple[Array, Array]]
"""By "text" and "image": of each row, the sum of its weighted losses, and of its weights."""


def timesteps(steps: int) -> list[int]:
    """The middles of eight equal ranges of `steps` timesteps: 62, 187, ..., 937 of 1,000."""
    return [steps * (2 * i + 1) // (2 * TIMESTEPS) for i in range(TIMESTEPS)]


def validator(planned: Blueprint, mesh: Mesh, tokenizer: Tokenizer) -> Observer:
    """What measures a run every `train.validate_every` steps.

    It gives `validation/<source>/text_loss` (nats) and `validation/<source>/image_loss` (as in
    training: mean squared error, or nats where images are codes), of those that a source has.

    Raises:
      ValueError: no source has held-out rows.
    """
    validation = Validation(held_out(planned.experiment, tokenizer), planned, mesh)

    def look(step: int, state: Any, moved: Moved) -> Observation:
        return Observation(values=validation.measure(state.ema, moved))

    return Observer(planned.experiment.train.validate_every, look)


def held_out(experiment: Experiment, tokenizer: Tokenizer) -> Data:
    """The held-out rows; raises ValueError if no source has any."""
    data = Data(experiment, tokenizer, "held_out")
    names = ", ".join(source.name for source in data.sources)
    every = experiment.train.validate_every
    require(
        any(map(len, data.sources)), f"train.validate_every={every}: no held-out rows in {names}"
    )
    return data


@dataclass(frozen=True)
class Validation:
    """Held-out rows and the compiled function that measures them."""

    data: Data
    planned: Blueprint
    mesh: Mesh

    def measure(self, parameters: Any, moved: Moved) -> dict[str, float]:
        """The mean losses of every source, by their names in the metrics."""
        measured = {}
        for number, batches in enumerate(self._batches):
            totals = {name: np.zeros(2) for name in NAMES}
            for batch, row_B in batches:
                moved()
                for name, sums in self._row_sums(parameters, batch, row_B, number).items():
                    totals[name] += [np.sum(x, dtype=np.float64) for x in sums]
            for name, (loss, weight) in totals.items():
                if weight:
                    key = f"validation/{self.data.sources[number].name}/{name}_loss"
                    measured[key] = float(loss / weight)
        return measured

    def _row_sums(self, parameters: Any, batch: Batch, row_B: np.ndarray, number: int) -> dict:
        sharding = batch_sharding(self.mesh)

        def place(x: np.ndarray) -> Array:
            # Every process has all rows.
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        with jax.set_mesh(self.mesh):
            placed = jax.tree.map(place, (batch, row_B))
            return jax.device_get(self._compiled(parameters, *placed, np.int32(number)))

    @functools.cached_property
    def _compiled(self) -> Callable[..., Sums]:
        # On every device, so that every process can read them.
        return jax.jit(row_sums(self.planned), out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _batches(self) -> list[list[tuple[Batch, np.ndarray]]]:
        """Of every source; kept in the host's memory from the first measurement on."""
        return [
            list(self._source_batches(number, source))
            for number, source in enumerate(self.data.sources)
        ]

    def _source_batches(
        self, number: int, source: PlannedSource
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """The rows of a source and their numbers; empty rows fill up the last batch."""
        experiment = self.data.experiment
        total = len(source)
        count = min(experiment.train.validation_rows, total)
        places = [total * (2 * i + 1) // (2 * count) for i in range(count)]
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        # No more rows at a time than in training, and no more than there are.
        most = experiment.data.batch_rows // experiment.train.accumulation
        size = min(most, -(-max(count, 1) // shards) * shards)
        empty = pack([], experiment.data.row_length, experiment.image, experiment.image_slots)
        for begin in range(0, count, size):
            numbers = places[begin : begin + size]
            rows = [self.data.row(source, r, np.random.default_rng((number, r))) for r in numbers]
            fill = size - len(rows)
            yield stack(rows + [empty] * fill), np.asarray(numbers + [0] * fill, np.int32)


def row_sums(planned: Blueprint) -> Callable[[Any, Batch, Array, Array], Sums]:
    """(parameters, batch, number of each row, number of the source) -> sums of rows."""
    experiment = planned.experiment
    chunk = experiment.train.vocab_chunk
    t_of = jnp.asarray(timesteps(experiment.diffusion.steps), jnp.int32)

    def total(values: Array) -> Array:
        return values.reshape(values.shape[0], -1).sum(1)

    def sums(parameters: Any, batch: Batch, row_B: Array, source: Array) -> Sums:
        model = nnx.merge(planned.graph, parameters)
        weights = model.weights(batch)
        key = jax.random.fold_in(jax.random.key(0), source)

        def losses(t: Array, noise_BMhwc: Array) -> dict[str, Array]:
            t_BM = jnp.full_like(batch.image_start_BM, t)
            return model.losses(batch, Noise(t_BM, noise_BMhwc), chunk)

        def noise(row: Array, i: Array) -> Array:
            key_of_image = jax.random.fold_in(jax.random.fold_in(key, row), i)
            return jax.random.normal(key_of_image, batch.latents_BMhwc.shape[1:], jnp.float32)

        def image(i: Array) -> Array:
            noise_BMhwc = jax.vmap(noise, (0, None))(row_B, i)
            return total(losses(t_of[i], noise_BMhwc)["image"] * weights["image"])

        clean = losses(jnp.int32(0), jnp.zeros_like(batch.latents_BMhwc))
        found = {
            name: (total(clean[name] * weights[name]), total(weights[name]))
            for name in NAMES
            if name in weights
        }
        if experiment.model.images == "latents":
            images_KB = jax.lax.map(image, jnp.arange(TIMESTEPS))
            found["image"] = images_KB.mean(0), found["image"][1]
        return found

    return sums
