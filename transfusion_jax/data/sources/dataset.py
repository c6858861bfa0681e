"""A prepared data set on disk, as `prepare` wrote it; its records are read at random."""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from transfusion_jax.config import ImageConfig
from transfusion_jax.data.packing import plan
from transfusion_jax.data.sources import records
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.images import from_uint8

ROUNDED = 128  # embedding rows are a multiple of this, so that a mesh divides them
ROW_STEP = 8  # row lengths that are tried are multiples of this
ROW_SAMPLE = 4096  # documents that they are tried on


@dataclass(frozen=True)
class Dataset:
    """A prepared data set on disk; records are read at random."""

    path: Path
    info: dict[str, Any]
    """The content of dataset.json."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image as the model sees it."""
        return tuple(self.info["image"]["shape"])

    @property
    def is_latent(self) -> bool:
        return self.info["image"]["stored"] == "latents"

    @property
    def embedding_rows(self) -> int:
        """The tokenizer's ids, rounded up so that a mesh divides them."""
        return -(-self.info["tokenizer"]["entries"] // ROUNDED) * ROUNDED

    def image_config(self, patch: int = 2) -> ImageConfig:
        """The images of the data set, in square patches of this side."""
        return ImageConfig(*self.image_shape, patch)

    def row_length(self, image: ImageConfig, images: int = 4) -> int:
        """The shortest row length, for about this many images a row, that documents fill well.

        Lengths are tried from the one that so many images with their text take on average, or that
        the longest training document with an image takes, to a quarter more; the shortest of those
        that are within half a percent of the fullest is taken.

        Raises:
          ValueError: no training document has an image; then rows of any length are full.
        """
        chosen = ~self.index.held_out & (self.index.images > 0)
        text, count = (x[chosen].astype(np.int64) for x in (self.index.text, self.index.images))
        require(len(text) > 0, f"{self.path} has no images, so any row length suits it")
        lengths = text + count * image.span + 2
        least = max(images * lengths.sum() / count.sum(), lengths.max())
        least = math.ceil(least / ROW_STEP) * ROW_STEP
        sample = lengths[:: math.ceil(len(lengths) / ROW_SAMPLE)]
        filled = {
            length: plan(sample, length, splittable=False).filled(length)
            for length in range(least, least * 5 // 4 + 1, ROW_STEP)
        }
        return min(n for n, share in filled.items() if share > max(filled.values()) - 0.005)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(
            (self.path / "tokenizer.model").read_bytes(), str(self.path / "tokenizer.model")
        )

    @functools.cached_property
    def index(self) -> records.Index:
        text, images, held_out = np.load(self.path / "index.npy")
        return records.Index(text, images, held_out.astype(bool))

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        return grain.sources.ArrayRecordDataSource(
            [str(self.path / "shards" / s["name"]) for s in self._shards]
        )

    @property
    def _shards(self) -> list[dict[str, Any]]:
        return [shard for shard in self.info["shards"] if shard["documents"]]

    def record(self, number: int) -> records.Record:
        shape = (
            ((2, *self.image_shape), np.dtype("<f2"))
            if self.is_latent
            else (self.image_shape, np.dtype("u1"))
        )
        return records.decode(
            self._records[number], records.id_type(self.tokenizer.size), shape[1], shape[0]
        )

    def image(self, stored: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """A stored image as float32 [h, w, c] for the model: a latent sampled with `rng` or its mean, or pixels."""
        return self.images([stored], rng)[0]

    def images(
        self, stored: Sequence[np.ndarray], rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Stored images as float32 [n, h, w, c]; in few operations: threads wait for each other at each."""
        if not self.is_latent:
            return from_uint8(np.stack(stored))
        mean, std = np.stack(stored, axis=1).astype(np.float32)
        latents = mean
        if rng is not None:
            latents = rng.standard_normal(mean.shape, np.float32)
            latents *= std
            latents += mean
        latents -= np.float32(self.info["image"]["shift"])
        latents *= np.float32(self.info["image"]["scale"])
        return latents


def open_dataset(path: str | Path) -> Dataset:
    """The data set in a directory.

    Raises:
      ValueError: there is none, it is not finished, or shards are missing or have another size.
    """
    path = Path(path)
    file = path / "dataset.json"
    if not file.is_file():
        unfinished = (path / "identity.json").is_file()
        raise ValueError(
            f"{path} is {'not finished: run prepare again' if unfinished else 'no prepared data set'}"
        )
    try:
        info = json.loads(file.read_text())
        shards = {shard["name"]: shard["bytes"] for shard in info["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name, size in shards.items():
        shard = path / "shards" / name
        require(shard.is_file(), f"{path} has lost the shard {name}")
        found = shard.stat().st_size
        require(
            found == size, f"the shard {shard} has {found} bytes, and {size} when it was prepared"
        )
    index = path / "index.npy"
    digest = hashlib.sha256(index.read_bytes()).hexdigest() if index.is_file() else "missing"
    require(digest == info["index_sha256"], f"{index} is not the one that was prepared")
    return Dataset(path, info)
