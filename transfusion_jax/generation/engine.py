"""The engine: a trained model that continues documents with text and images, on one cache.

Reading the prompts, writing text and drawing images (section 3.4) are a compiled program each; the
loop here runs them on all rows of a batch until every row is done.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.codec import Codec, load_codec
from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, ModelConfig
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.images import draw_images
from transfusion_jax.generation.requests import Request, read_requests
from transfusion_jax.generation.rows import DONE, IMAGE, TEXT, Rows, start
from transfusion_jax.generation.text import write_text
from transfusion_jax.images import read_image
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.build import abstract_model
from transfusion_jax.pretraining.run import stored
from transfusion_jax.training.checkpoint import Report, load_average

Span = str | np.ndarray
"""A text, or a picture [H, W, C] in [-1, 1]."""


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Engine:
    """A model ready to generate. Everything is a function of (parameters, requests, seed)."""

    experiment: Experiment
    tokenizer: Tokenizer
    graph: nnx.GraphDef
    parameters: dict
    codec: Codec | None = None
    """The autoencoder of a run on latents; None: images are pixels."""
    moved: Callable[[], None] = nothing
    """Called between the parts of longer work; what it raises ends that."""

    def generate(self, requests: Sequence[Request], seed: int = 0) -> list[list[Span]]:
        """Continues every request, as one batch; returns the new spans of each.

        A request that has added `sampler.max_tokens` positions ends there.
        """
        answers: list[list[Span]] = [[] for _ in requests]
        for row, span in self.stream(requests, seed):
            answers[row].append(span)
        return answers

    def stream(self, requests: Sequence[Request], seed: int = 0) -> Iterator[tuple[int, Span]]:
        """As `generate`, span by span: (number of the request, its next span)."""
        batch, length_B = self._read(requests)
        budget = self.experiment.sampler.max_tokens
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), jnp.arange(len(requests))
        )
        # A row that has reached its limit still writes, past its length.
        capacity = batch.tokens_BL.shape[1] + budget + self.experiment.image.span
        rows = self._start(self.parameters, batch, length_B, key_B, capacity=capacity)
        limit_B = length_B + budget
        while (status_B := np.asarray(rows.status_B)).min() < DONE:
            self.moved()
            if TEXT in status_B:
                rows, tokens_BT = self._write_text(self.parameters, rows, limit_B, budget=budget)
                for row, tokens in enumerate(np.asarray(tokens_BT)):
                    if text := self.tokenizer.decode(tokens[tokens >= 0]):
                        yield row, text
            drawing = np.flatnonzero(np.asarray(rows.status_B) == IMAGE)
            if len(drawing):
                rows, image_Bhwc = self._draw_images(self.parameters, rows)
                for row in drawing:
                    yield int(row), self.picture(np.asarray(image_Bhwc[row]))

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        """An image of the model's as a picture [H, W, C] in [-1, 1]."""
        return image_hwc if self.codec is None else self.codec.picture(image_hwc)

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        """A picture as an image of the model's [h, w, c]: itself, or the mean of its latent."""
        return picture_HWC if self.codec is None else self.codec.image(picture_HWC)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures it takes and gives."""
        image = self.experiment.image
        if self.codec is None:
            return image.shape
        factor = self.codec.config.downsampling
        return image.height * factor, image.width * factor, self.codec.config.channels

    def read(self, path: Path) -> np.ndarray:
        """A picture file, cropped and resized to `picture_shape`.

        Raises:
          ValueError: it cannot be read.
        """
        return read_image(path, *self.picture_shape)

    def check(self, requests: Sequence[Request]) -> None:
        """Raises ValueError for a request that is longer than a row."""
        self._read(requests)

    def using(self, **changes: object) -> "Engine":
        """The same model with other sampler settings; raises ValueError for those that cannot
        work."""
        changed = replace(self.experiment.sampler, **changes)
        return replace(self, experiment=replace(self.experiment, sampler=changed))

    def with_weights(self, parameters: dict) -> "Engine":
        """The same model with other weights; what is compiled, now or later, serves both."""
        other = replace(self, parameters=parameters)
        for phase in ("_start", "_write_text", "_draw_images"):
            other.__dict__[phase] = getattr(self, phase)
        return other

    def _read(self, requests: Sequence[Request]) -> tuple[Batch, Array]:
        return read_requests(requests, self.experiment, self.tokenizer, self.image)

    @functools.cached_property
    def _start(self) -> Callable[..., Rows]:
        timestep = self.experiment.sampler.context_timestep
        return self._compiled(functools.partial(start, timestep=timestep), "capacity")

    @functools.cached_property
    def _write_text(self) -> Callable[..., tuple[Rows, Array]]:
        settings = {"experiment": self.experiment, "tokenizer": self.tokenizer}
        return self._compiled(functools.partial(write_text, **settings), "budget")

    @functools.cached_property
    def _draw_images(self) -> Callable[..., tuple[Rows, Array]]:
        settings = {"experiment": self.experiment, "tokenizer": self.tokenizer}
        return self._compiled(functools.partial(draw_images, **settings))

    def _compiled(self, phase: Callable, *static: str) -> Callable:
        """A phase, a function of a model and arrays, jitted as one of parameters and arrays."""

        def run(parameters, *arrays, **options):
            return phase(nnx.merge(self.graph, parameters), *arrays, **options)

        return jax.jit(run, static_argnames=static)


def load_engine(directory: Path, report: Report) -> tuple[Engine, int]:
    """The averaged model of a run's newest readable checkpoint, on one device, and its step.

    Raises:
      ValueError: `directory` is no run directory, or has no checkpoint yet.
      CheckpointError: none of its checkpoints can be read.
    """
    experiment, tokenizer = stored(directory, report)
    device = jax.local_devices()[0]
    experiment = replace(experiment, model=_model_here(experiment.model, device, report))
    graph, parameters = abstract_model(experiment)
    placed = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        nnx.to_pure_dict(parameters),
    )
    step, average = load_average(directory / "checkpoints", abstract, report)
    codec = load_codec(directory / "autoencoder") if (directory / "autoencoder").is_dir() else None
    return Engine(experiment, tokenizer, graph, average, codec), step


def _model_here(model: ModelConfig, device: jax.Device, report: Report) -> ModelConfig:
    """The model without rematerialisation, and with an attention that runs on this device: it may
    have been trained on another platform."""
    model = replace(model, remat="none")
    try:
        return for_platform(model, device.platform)
    except ValueError as error:
        report(f"{error}; using auto")
        return for_platform(replace(model, attention="auto"), device.platform)
