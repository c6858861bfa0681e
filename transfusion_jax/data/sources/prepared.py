"""Prepared data: what `prepare` wrote, as a source of documents for training."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.config import Experiment, ImageConfig
from transfusion_jax.data.documents import Document, Text, interleaved_document, pair_document
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import Dataset, open_dataset
from transfusion_jax.data.sources.source import Assets, LatentSpace
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require


class Prepared:
    """The documents of one split of a prepared data set, "train" or "held_out".

    Raises:
      ValueError: it is damaged, or its images are not those of the experiment.
    """

    def __init__(self, path: Path, experiment: Experiment, split: str):
        self.dataset = open_dataset(path)
        self.experiment = experiment
        info = self.dataset.info
        # A model of text alone is refused whatever the images are.
        if info["images"] and experiment.model.images != "none":
            _check_images(self.dataset, experiment.image)
        self.numbers = self.dataset.numbers(split)
        digest = _digest(info)
        planned = hashlib.sha256(digest + f"{split} {experiment.image.span}".encode()).hexdigest()
        self.assets = Assets(
            digest,
            self.dataset.tokenizer,
            _latents(self.dataset),
            path / "plans" / planned[:16],
            self.dataset.codes,
        )

    @functools.cached_property
    def splittable(self) -> np.ndarray:
        return self.dataset.index.images[self.numbers] == 0

    def texts(self) -> Iterator[str]:
        return iter(())

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        index = self.dataset.index
        lengths = index.images[self.numbers]
        lengths *= np.int32(self.experiment.image.span)
        lengths += index.text[self.numbers]
        lengths += np.int32(2)
        return lengths

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        """The documents; all their images are made in one call, which is faster."""
        found = [self.dataset.record(number) for number in self.numbers[list(indices)].tolist()]
        stored = [x for record in found for kind, x in record.spans if kind == records.IMAGE]
        images = iter(self.dataset.images(stored, rng) if stored else ())
        return [self._document(record, images, tokenizer, rng) for record in found]

    def _document(
        self,
        record: records.Record,
        images: Iterator[np.ndarray],
        tokenizer: Tokenizer,
        rng: np.random.Generator,
    ) -> Document:
        data, diffusion = self.experiment.data, self.experiment.diffusion
        spans = [next(images) if kind == records.IMAGE else Text(x) for kind, x in record.spans]
        if record.captions:
            return pair_document(record.captions, spans[0], tokenizer, data, diffusion, rng)
        return interleaved_document(spans, tokenizer, data, diffusion, rng)


def _check_images(dataset: Dataset, image: ImageConfig) -> None:
    """Raises ValueError unless the images have the experiment's shape and codebook size."""
    path, codes = dataset.path, dataset.codes
    require(
        codes > 0 or image.codes == 0,
        f"the images of {path} are no codes, and the model needs codes: prepare them with a VQ "
        f"autoencoder of {image.codes}",
    )
    require(
        codes == image.codes,
        f"the images of {path} are codes of {codes}, the experiment has image.codes={image.codes}: "
        f"{dataset.flags}",
    )
    require(
        dataset.image_shape == image.shape,
        f"the images of {path} are {_size(dataset.image_shape)} {dataset.stored}, the "
        f"experiment's are {_size(image.shape)}: {dataset.flags}",
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _digest(info: dict[str, Any]) -> bytes:
    """Identifies the content of a data set."""
    return json.dumps([info[name] for name in ("shards", "index_sha256", "image")]).encode()


def _latents(dataset: Dataset) -> LatentSpace | None:
    if dataset.stored == "pixels":
        return None
    image = dataset.info["image"]
    return LatentSpace(
        image["autoencoder"], image["scale"], image["shift"], dataset.path / "autoencoder"
    )
