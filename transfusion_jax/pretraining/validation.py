"""Validation: the losses of the averaged weights on held-out rows, while a run trains.

The rows of a source are evenly spaced over all its held-out ones. What is drawn for row r of source
n (captions, latents, noise) comes from (n, r) alone: runs of the same data are measured on the same
numbers, whatever their seed, mesh and batch, at every step. An image that is diffused is measured
at the middles of eight equal ranges of timesteps, with noise of its own at each. The suite
`likelihood` measures with the same function (`row_sums`), images at other timesteps.
"""

import functools
from collections.abc import Callable
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
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.diffusion.process import Noise, process
from transfusion_jax.errors import require
from transfusion_jax.parallel.rules import batch_sharding, replicated
from transfusion_jax.pretraining.state import Blueprint
from transfusion_jax.training.observation import Moved, Observation, Observer

TIMESTEPS = 8
NAMES = ("text", "image")
Sums = dict[str, tuple[Array, Array]]
"""By "text" and "image": of each row, the sum of its weighted losses, and of its weights; [B], or
[B, times] of images that are diffused."""
Draw = Callable[[Array, Array, tuple[int, ...]], tuple[Array, Array]]
"""(a row's key, i, shape [M, h, w, c]) -> timesteps [M] and noise of its images the i-th time."""


def timesteps(steps: int) -> list[int]:
    """The middles of eight equal ranges of `steps` timesteps: 62, 187, ..., 937 of 1,000."""
    return [steps * (2 * i + 1) // (2 * TIMESTEPS) for i in range(TIMESTEPS)]


def draw_at(t_of: list[int]) -> Draw:
    """At these timesteps, with other noise at each."""

    def draw(key: Array, i: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        noise_Mhwc = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        return jnp.full(shape[:1], jnp.asarray(t_of, jnp.int32)[i]), noise_Mhwc

    return draw


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
        for source, batches in zip(self.data.sources, self._batches, strict=True):
            totals = Totals()
            for batch, number_B2 in batches:
                moved()
                totals.add(self._row_sums(parameters, batch, number_B2))
            for name, means in totals.means().items():
                if len(means):
                    found = float(np.mean(list(means.values())))
                    measured[f"validation/{source.name}/{name}_loss"] = found
        return measured

    def _row_sums(self, parameters: Any, batch: Batch, number_B2: np.ndarray) -> Sums:
        sharding = batch_sharding(self.mesh)

        def place(x: np.ndarray) -> Array:
            # Every process has all rows.
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        with jax.set_mesh(self.mesh):
            placed = jax.tree.map(place, (batch, number_B2))
            return jax.device_get(self._compiled(parameters, *placed))

    @functools.cached_property
    def _compiled(self) -> Callable[..., Sums]:
        experiment, graph = self.planned.experiment, self.planned.graph
        draw = draw_at(timesteps(experiment.diffusion.steps))
        sums = row_sums(experiment, graph, draw, TIMESTEPS)
        # On every device, so that every process can read them.
        return jax.jit(sums, out_shardings=replicated(self.mesh))

    @functools.cached_property
    def _batches(self) -> list[list[tuple[Batch, np.ndarray]]]:
        """Of every source; kept in the host's memory from the first measurement on."""
        experiment = self.data.experiment
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        # No more rows at a time than in training, and no more than there are.
        most = experiment.data.batch_rows // experiment.train.accumulation
        found = []
        for number, source in enumerate(self.data.sources):
            count = min(experiment.train.validation_rows, len(source))
            size = min(most, -(-max(count, 1) // shards) * shards)
            found.append(list(self.data.numbered(size, [number], count)))
        return found


class Totals:
    """Sums of rows, added up."""

    def __init__(self):
        self._sums: dict[str, np.ndarray] = {}

    def add(self, sums: Sums) -> None:
        """Those of more rows."""
        for name, parts in sums.items():
            added = np.asarray([np.sum(x, axis=0, dtype=np.float64) for x in parts])
            self._sums[name] = self._sums.get(name, 0.0) + added.reshape(2, -1)

    def means(self) -> dict[str, dict[int, float]]:
        """By name, the weighted mean of every time at which something was measured."""
        return {
            name: {i: float(x / w) for i, (x, w) in enumerate(zip(*sums, strict=True)) if w}
            for name, sums in self._sums.items()
        }


def row_sums(
    experiment: Experiment, graph: nnx.GraphDef, draw: Draw, times: int
) -> Callable[[Any, Batch, Array], Sums]:
    """(parameters, batch, number of each row's source and of the row there) -> sums of rows.

    Text is measured beside clean images, seen as generation shows finished ones, and so are codes.
    Images that are diffused are measured so many `times` with what `draw` gives; where the timestep
    is not below an image's noise limit, which training never draws, it does not count.
    """
    chunk, corruption = experiment.train.vocab_chunk, process(experiment.diffusion)

    def total(values: Array) -> Array:
        return values.reshape(values.shape[0], -1).sum(1)

    def sums(parameters: Any, batch: Batch, number_B2: Array) -> Sums:
        model = nnx.merge(graph, parameters)
        weights = model.weights(batch)
        key_B = jax.vmap(_row_key)(number_B2)

        def image(i: Array) -> tuple[Array, Array]:
            shape = batch.latents_BMhwc.shape[1:]
            noise = Noise(*jax.vmap(lambda key: draw(key, i, shape))(key_B))
            weight_BM = jnp.where(noise.t_BM < batch.image_limit_BM, weights["image"], 0.0)
            return total(model.losses(batch, noise, chunk)["image"] * weight_BM), total(weight_BM)

        t_BM = jnp.full_like(batch.image_start_BM, experiment.sampler.context_timestep)
        finished = Noise(t_BM, corruption.unnoticed(batch.latents_BMhwc, t_BM))
        clean = model.losses(batch, finished, chunk)
        found = {
            name: (total(clean[name] * weights[name]), total(weights[name]))
            for name in NAMES
            if name in weights
        }
        if experiment.model.images == "latents":
            of_times = jax.lax.map(image, jnp.arange(times))
            found["image"] = tuple(jnp.moveaxis(x, 0, 1) for x in of_times)
        return found

    return sums


def _row_key(number_2: Array) -> Array:
    """Of all that is drawn for a held-out row."""
    source, row = number_2
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), source), row)
