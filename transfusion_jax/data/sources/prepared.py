"""Prepared data: what `prepare` wrote, as a source of documents for training."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, Text, interleaved_document, pair_document
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import Dataset, open_dataset
from transfusion_jax.data.sources.source import Assets, LatentSpace
from transfusion_jax.data.tokenizer import Tokenizer


class Prepared:
    """The documents of one split of a prepared data set, "train" or "held_out".

    Raises:
      ValueError: it is damaged, or its images are not those of the experiment.
    """

    def __init__(self, path: Path, experiment: Experiment, split: str):
        self.dataset = open_dataset(path)
        self.experiment = experiment
        info = self.dataset.info
        if info["images"]:
            _check_codes(path, self.dataset.codes, experiment.image.codes)
        if info["images"] and self.dataset.image_shape != experiment.image.shape:
            h, w, c = self.dataset.image_shape
            raise ValueError(
                f"the images of {path} are {h}x{w}x{c} {info['image']['stored']}, the experiment's "
                f"are {'x'.join(map(str, experiment.image.shape))}: "
                f"--image.height {h} --image.width {w} --image.channels {c}"
            )
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


def _check_codes(path: Path, stored: int, asked: int) -> None:
    """Raises ValueError unless the codes that are stored are of a codebook as large as the
    model's."""
    if stored == asked:
        return
    if not stored:
        raise ValueError(
            f"the images of {path} are no codes, and the model needs codes: prepare them with a VQ "
            f"autoencoder of {asked}"
        )
    raise ValueError(
        f"the images of {path} are codes of {stored}, the experiment has image.codes={asked}: "
        f"--model.family chameleon --image.codes {stored}"
    )


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
