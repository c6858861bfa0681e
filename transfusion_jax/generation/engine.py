"""The engine: a trained model that continues documents with text and images, on one cache.

Reading the prompts, writing text and drawing images (section 3.4) are a compiled program each; the
loop here runs them on all rows of a batch until every row is done.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.autoencoder.codec import Codec, load_codec
from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, MeshConfig, ModelConfig
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.generation.devices import Devices
from transfusion_jax.generation.images import draw_images
from transfusion_jax.generation.requests import Request, ends_in_text, read_requests
from transfusion_jax.generation.rows import DONE, IMAGE, TEXT, Rows, cache_bytes, start
from transfusion_jax.generation.text import write_text
from transfusion_jax.images import MODES, read_image
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.build import abstract_model
from transfusion_jax.parallel.mesh import make_mesh, whole_rows
from transfusion_jax.parallel.processes import check_collectives
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.pretraining.run import stored
from transfusion_jax.training.checkpoint import Report, load_average
from transfusion_jax.training.observation import Moved, nothing

Span = str | np.ndarray
"""A text, or a picture [H, W, C] in [-1, 1]."""


@dataclass(frozen=True)
class Engine:
    """A model ready to generate. Everything is a function of (parameters, requests, seed)."""

    experiment: Experiment
    tokenizer: Tokenizer
    graph: nnx.GraphDef
    parameters: dict
    codec: Codec | None = None
    """The autoencoder of a run on latents; None: images are pixels."""
    devices: Devices = Devices()
    """Where the parameters are."""
    moved: Moved = nothing
    """Called between the parts of longer work; what it raises ends that."""

    def generate(
        self, requests: Sequence[Request], seed: int = 0, draw: bool = False
    ) -> list[list[Span]]:
        """Continues every request; returns the new spans of each.

        A request that has added `sampler.max_tokens` positions ends there. Requests are answered
        in groups whose caches fit the devices; the answers are those of one batch.

        Args:
          draw: begin every answer with an image, instead of leaving that to the model.
        """
        answers: list[list[Span]] = [[] for _ in requests]
        for row, span in self.stream(requests, seed, draw):
            answers[row].append(span)
        return answers

    def stream(
        self, requests: Sequence[Request], seed: int = 0, draw: bool = False
    ) -> Iterator[tuple[int, Span]]:
        """As `generate`, span by span: (number of the request, its next span)."""
        read = self._read(requests)
        row_bytes = cache_bytes(self.experiment.model, self._capacity(read[0]))
        if self.experiment.sampler.candidates > 1:
            row_bytes *= 2  # a candidate is read on a cache of its own
        size = self.devices.group(len(requests), row_bytes)
        for first in range(0, len(requests), size):
            # Every group is as large, and so compiled once: the last request fills up the last.
            chosen = np.minimum(np.arange(first, first + size), len(requests) - 1)
            group = jax.tree.map(lambda x, rows=chosen: x[rows], read)
            key_B = self.devices.keys(seed, first, size)
            for row, span in self._answer(*group, key_B, draw, requests[first : first + size]):
                yield first + row, span

    def _capacity(self, batch: Batch) -> int:
        """Positions of a cache; a row that has reached its limit still writes, past its length."""
        budget, image = self.experiment.sampler.max_tokens, self.experiment.image
        return batch.tokens_BL.shape[1] + budget + image.span

    def _answer(
        self,
        batch: Batch,
        length_B: np.ndarray,
        key_B: Array,
        draw: bool,
        requests: Sequence[Request],
    ) -> Iterator[tuple[int, Span]]:
        """Continues the rows of a batch, of which the first are these requests, until every one is
        done: (number of the request, its next span)."""
        count = len(requests)
        continued = [ends_in_text(request) for request in requests]  # until an image comes
        capacity, budget = self._capacity(batch), self.experiment.sampler.max_tokens
        limit_B = self.devices.put(length_B + budget)
        batch, length_B = self.devices.put((batch, length_B))
        boi = self.tokenizer.boi if draw else None
        rows = self._start(self.parameters, batch, length_B, key_B, capacity=capacity, boi=boi)
        while (status_B := self.devices.host(rows.status_B)).min() < DONE:
            if TEXT in status_B:
                self.moved()
                rows, tokens_BT = self._write_text(self.parameters, rows, limit_B, budget=budget)
                for row, tokens in enumerate(self.devices.host(tokens_BT)[:count]):
                    if text := self.tokenizer.decode(tokens[tokens >= 0], continued[row]):
                        yield row, text
            drawing = np.flatnonzero(self.devices.host(rows.status_B) == IMAGE)
            if len(drawing):
                self.moved()
                rows, image_Bhwc = self._draw_images(self.parameters, rows)
                images = self.devices.host(image_Bhwc)
                for row in drawing[drawing < count]:
                    continued[row] = False
                    yield int(row), self.picture(images[row])

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        """An image of the model's as a picture [H, W, C] in [-1, 1]."""
        return image_hwc if self.codec is None else self.codec.picture(image_hwc)

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        """A picture as an image of the model's [h, w, c]: itself, or the mean of its latent."""
        return picture_HWC if self.codec is None else self.codec.image(picture_HWC)

    def latent(self, image_hwc: np.ndarray) -> np.ndarray:
        """An image of the model's as one that can be compared: itself, or what its codes stand
        for."""
        return image_hwc if self.codec is None else self.codec.latent(image_hwc)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures it takes and gives."""
        image = self.experiment.image
        if self.codec is None:
            return image.shape
        factor = self.codec.config.downsampling
        return image.height * factor, image.width * factor, self.codec.config.channels

    def require_pictures(self) -> None:
        """Raises ValueError if its images are latents or codes, and no autoencoder makes pictures
        of them."""
        image = self.experiment.image
        pixels = image.channels in MODES and not image.codes
        require(
            self.codec is not None or pixels or self.experiment.model.images == "none",
            f"images of {f'{image.codes} codes' if image.codes else f'{image.channels} channels'} "
            "are no pixels, and the run has no autoencoder that makes pictures of them: those of "
            "its data were made up",
        )

    def read(self, path: Path) -> np.ndarray:
        """A picture file, cropped and resized to `picture_shape`.

        Raises:
          ValueError: it cannot be read.
        """
        return read_image(path, *self.picture_shape)

    def check(self, requests: Sequence[Request]) -> int:
        """The most positions that a request and its answer may take.

        Raises:
          ValueError: a request is longer than a row, or shows a picture to a model of text alone.
        """
        _, length_B = self._read(requests)
        return int(length_B.max()) + self.experiment.sampler.max_tokens

    def using(self, **changes: object) -> "Engine":
        """The same model with other sampler settings; raises ValueError for those that cannot
        work."""
        changed = replace(self.experiment.sampler, **changes)
        if changed == self.experiment.sampler:
            return self  # with what it has compiled
        return replace(self, experiment=replace(self.experiment, sampler=changed))

    def with_weights(self, parameters: dict, moved: Moved | None = None) -> "Engine":
        """The same model with other weights, cut as in training and rounded to the compute dtype.

        What is compiled, now or later, serves both. It calls another `moved`, if that is given.
        """
        _, shapes = abstract_model(self.experiment)
        placed = jax.device_put(
            _narrowed(parameters, shapes, self.experiment.model.compute_dtype),
            parameter_shardings(shapes, self.devices.mesh),
        )
        other = replace(self, parameters=placed, moved=moved or self.moved)
        for phase in ("_start", "_write_text", "_draw_images"):
            other.__dict__[phase] = getattr(self, phase)
        return other

    def _read(self, requests: Sequence[Request]) -> tuple[Batch, np.ndarray]:
        model = self.experiment.model
        shown = any(not isinstance(span, str) for request in requests for span in request)
        require(
            model.images != "none" or not shown,
            f"model.family={model.family!r} reads and writes text alone, and is shown a picture",
        )
        return read_requests(requests, self.experiment, self.tokenizer, self.image)

    @functools.cached_property
    def _start(self) -> Callable[..., Rows]:
        settings = {
            "timestep": self.experiment.sampler.context_timestep,
            "eoi": self.tokenizer.eoi,
        }
        return self._compiled(functools.partial(start, **settings), "capacity", "boi")

    @functools.cached_property
    def _write_text(self) -> Callable[..., tuple[Rows, Array]]:
        settings = {"experiment": self.experiment, "tokenizer": self.tokenizer}
        return self._compiled(functools.partial(write_text, **settings), "budget", rows=1)

    @functools.cached_property
    def _draw_images(self) -> Callable[..., tuple[Rows, Array]]:
        settings = {"experiment": self.experiment, "tokenizer": self.tokenizer}
        return self._compiled(functools.partial(draw_images, **settings), rows=1)

    def _compiled(self, phase: Callable, *static: str, rows: int | None = None) -> Callable:
        """A phase, a function of a model and arrays, jitted as one of parameters and arrays; it
        takes over the buffers of argument `rows`."""

        @functools.partial(jax.jit, static_argnames=static, donate_argnums=rows)
        def run(parameters, *arrays, **options):
            return phase(nnx.merge(self.graph, parameters), *arrays, **options)

        def on_devices(*arrays, **options):
            with self.devices.current():
                return run(*arrays, **options)

        return on_devices


def load_engine(
    directory: Path, report: Report, mesh: Mapping[str, int] | None = None
) -> tuple[Engine, int]:
    """The averaged model of a run's newest readable checkpoint, and its step.

    It is cut over a mesh as for training; products round their factors to the compute dtype, so
    they are kept in it.

    Args:
      mesh: axes of another mesh than the run's. Without it, where the devices here cannot make the
        run's mesh, the model is on one device.

    Raises:
      ValueError: `directory` is no run directory, or has no checkpoint yet, or the mesh cannot be.
      CheckpointError: none of its checkpoints can be read.
    """
    experiment, tokenizer = stored(directory, report)
    made = _mesh(experiment.mesh, mesh or {}, report)
    engine = engine_without_weights(experiment, tokenizer, directory, made, report)
    _, parameters = abstract_model(engine.experiment)
    abstract = jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        nnx.to_pure_dict(parameters),
        parameter_shardings(parameters, engine.devices.mesh),
    )
    step, average = load_average(directory / "checkpoints", abstract, report)
    average = _narrowed(average, parameters, experiment.model.compute_dtype, donate=True)
    return replace(engine, parameters=average), step


def engine_without_weights(
    experiment: Experiment, tokenizer: Tokenizer, directory: Path, mesh: Mesh, report: Report
) -> Engine:
    """The engine of a run on the devices of a mesh; `Engine.with_weights` gives it weights."""
    devices = Devices(whole_rows(mesh))
    device = devices.mesh.devices.flat[0]
    experiment = replace(experiment, model=_model_here(experiment.model, device, report))
    graph, _ = abstract_model(experiment)
    codec = load_codec(directory / "autoencoder") if (directory / "autoencoder").is_dir() else None
    return Engine(experiment, tokenizer, graph, {}, codec, devices)


def _mesh(config: MeshConfig, asked: Mapping[str, int], report: Report) -> Mesh:
    if asked:
        mesh = make_mesh(replace(config, **asked))
    else:
        try:
            mesh = make_mesh(config)
        except ValueError as error:
            if jax.process_count() > 1:
                raise
            report(f"{error}; using one device, unless --mesh.data or its like say otherwise")
            mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    check_collectives(mesh)
    return mesh


def _narrowed(values: dict, parameters: nnx.State, dtype: str, donate: bool = False) -> dict:
    """Values of parameters in `dtype`, but for scales of norms, which are applied in float32."""
    axes = {path: x.get_metadata("out_sharding") for path, x in nnx.to_flat_state(parameters)}

    @functools.partial(jax.jit, donate_argnums=0 if donate else ())
    def narrow(values):
        return jax.tree.map_with_path(
            lambda path, x: x if "norm" in axes[tuple(p.key for p in path)] else x.astype(dtype),
            values,
        )

    return narrow(values)


def _model_here(model: ModelConfig, device: jax.Device, report: Report) -> ModelConfig:
    """The model without rematerialisation, and with an attention that runs on this device: it may
    have been trained on another platform."""
    model = replace(model, remat="none")
    try:
        return for_platform(model, device.platform)
    except ValueError as error:
        report(f"{error}; using auto")
        return for_platform(replace(model, attention="auto"), device.platform)
