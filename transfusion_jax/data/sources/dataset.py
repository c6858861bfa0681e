"""A prepared data set on disk, as `prepare` wrote it; its records are read at random."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.config import ImageConfig
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.shards import Shards
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.images import from_uint8

FORMAT = 2
"""Of dataset.json. In format 1 there are neither `splits/` nor documents that straddle the
split."""
READABLE = (1, 2)
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
    def stored(self) -> str:
        """What images are stored as: "pixels", "latents" or "codes"."""
        return self.info["image"]["stored"]

    @property
    def codes(self) -> int:
        """Entries of the codebook whose codes are stored; 0: none are."""
        return self.info["image"].get("codes", 0)

    @property
    def embedding_rows(self) -> int:
        """The tokenizer's ids, rounded up so that a mesh divides them."""
        return -(-self.info["tokenizer"]["entries"] // ROUNDED) * ROUNDED

    @property
    def flags(self) -> str:
        """What gives an experiment these images, and a model that takes them."""
        h, w, c = self.image_shape
        shape = f"--image.height {h} --image.width {w} --image.channels {c}"
        if not self.codes:
            return shape
        model = "--model.family chameleon --model.image-attention causal"
        return f"{shape} --image.patch 1 --image.codes {self.codes} {model}"

    def image_config(self, patch: int = 2) -> ImageConfig:
        """The images of the data set, in square patches of this side; codes are not cut into
        patches."""
        return ImageConfig(*self.image_shape, 1 if self.codes else patch, self.codes)

    def row_length(self, image: ImageConfig, images: int = 4) -> int:
        """The shortest row length, for about this many images a row, that documents fill well.

        Lengths are tried from the one that so many images with their text take on average, or that
        the longest training document with an image takes, to a quarter more; the shortest of those
        that are within half a percent of the fullest is taken.

        Raises:
          ValueError: no training document has an image; then rows of any length are full.
        """
        from transfusion_jax.data.packing import plan  # loads JAX, which `prepare` does without

        found = self._training_images
        require(
            found.images > 0,
            f"no training document of {self.path} has an image, so any row length suits it; "
            "experiments/own_text.py is for text alone",
        )
        longest = max(text + n * image.span + 2 for n, text in found.longest)
        total = found.text + found.images * image.span + 2 * found.documents
        least = max(images * total / found.images, longest)
        least = math.ceil(least / ROW_STEP) * ROW_STEP
        sample = np.asarray([text + n * image.span + 2 for text, n in found.sample])
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
        """What packing is planned from, memory-mapped.

        Raises:
          ValueError: it is not the one that was prepared; for this it is read as a whole.
        """
        self._check("index.npy")
        return records.Index(*np.load(self.path / "index.npy", mmap_mode="r"))

    def numbers(self, split: str) -> np.ndarray:
        """The records of "train" or "held_out", in order; memory-mapped where `prepare` stored
        them."""
        name = f"splits/{split}.npy"
        if name in self.info.get("files", {}):
            return np.load(self.path / name, mmap_mode="r")
        return np.flatnonzero(self.index.split == records.SPLITS[split])

    def verify(self) -> None:
        """Compares the index and the splits with their checksums; raises ValueError if they
        differ."""
        for name in self.info.get("files", {"index.npy": None}):
            self._check(name)

    def _check(self, name: str) -> None:
        files = self.info.get("files", {"index.npy": {"sha256": self.info["index_sha256"]}})
        file = self.path / name
        found = file_digest(file) if file.is_file() else "missing"
        require(found == files[name]["sha256"], f"{file} is not the one that was prepared")

    @property
    def _training_images(self) -> "ImageStatistics":
        stored = self.info.get("training_images")
        return ImageStatistics(**stored) if stored else ImageStatistics.of(self.index)

    @functools.cached_property
    def _records(self) -> Shards:
        shards = self.info["shards"]
        names = [shard["name"] for shard in shards]
        return Shards(self.path / "shards", names, [shard["documents"] for shard in shards])

    def record(self, number: int) -> records.Record:
        kind, shape = {
            "pixels": (np.dtype("u1"), self.image_shape),
            "latents": (np.dtype("<f2"), (2, *self.image_shape)),
            "codes": (records.id_type(self.codes), self.image_shape),
        }[self.stored]
        return records.decode(
            self._records[number], records.id_type(self.tokenizer.size), kind, shape
        )

    def image(self, stored: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """A stored image as float32 [h, w, c] for the model: a latent sampled with `rng` or its
        mean, pixels, or code numbers."""
        return self.images([stored], rng)[0]

    def images(
        self, stored: Sequence[np.ndarray], rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Stored images as float32 [n, h, w, c]; in few operations: threads wait for each other at
        each."""
        if self.stored == "pixels":
            return from_uint8(np.stack(stored))
        if self.stored == "codes":
            return np.stack(stored).astype(np.float32)
        mean, std = np.stack(stored, axis=1).astype(np.float32)
        latents = mean
        if rng is not None:
            latents = rng.standard_normal(mean.shape, np.float32)
            latents *= std
            latents += mean
        latents -= np.float32(self.info["image"]["shift"])
        latents *= np.float32(self.info["image"]["scale"])
        return latents


@dataclass(frozen=True)
class ImageStatistics:
    """The lengths of the training documents that have images, as far as row lengths depend on
    them."""

    documents: int
    text: int
    """Tokens, of all together."""
    images: int
    """Images, of all together."""
    longest: list[list[int]]
    """[images, the most text tokens of a document with so many], for all numbers there are."""
    sample: list[list[int]]
    """[text, images] of documents that are evenly spread over the data set."""

    @classmethod
    def of(cls, index: records.Index) -> "ImageStatistics":
        chosen = (index.split == records.TRAIN) & (index.images > 0)
        text = index.text[chosen]
        images = index.images[chosen]
        longest = np.zeros(images.max(initial=0) + 1, text.dtype)
        np.maximum.at(longest, images, text)
        counts = np.unique(images)
        step = max(math.ceil(len(text) / ROW_SAMPLE), 1)
        return cls(
            len(text),
            int(text.sum(dtype=np.int64)),
            int(images.sum(dtype=np.int64)),
            np.stack([counts, longest[counts]], axis=1).tolist(),
            np.stack([text[::step], images[::step]], axis=1).tolist(),
        )


def open_dataset(path: str | Path) -> Dataset:
    """The data set in a directory. Files are compared by size; what is read whole, by checksum.

    Raises:
      ValueError: there is none, it is not finished, or files are missing or have another size.
    """
    path = Path(path)
    file = path / "dataset.json"
    if not file.is_file():
        unfinished = (path / "identity.json").is_file()
        state = "not finished: run prepare again" if unfinished else "no prepared data set"
        raise ValueError(f"{path} is {state}")
    try:
        info = json.loads(file.read_text())
        shards = {shard["name"]: shard["bytes"] for shard in info["shards"]}
        files = {name: entry["bytes"] for name, entry in info.get("files", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    known = info.get("format")
    require(
        known in READABLE,
        f"{path} was prepared in format {known}; this version reads "
        f"{' and '.join(map(str, READABLE))}",
    )
    _check_sizes(path, shards, path / "shards", "shard")
    for name, size in files.items():
        _check_sizes(path, {Path(name).name: size}, (path / name).parent, "file")
    return Dataset(path, info)


def _check_sizes(path: Path, sizes: dict[str, int], folder: Path, kind: str) -> None:
    """Compares files with the sizes they had, by listing their folder once."""
    found = {}
    if folder.is_dir():
        found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, size in sizes.items():
        require(name in found, f"{path} has lost the {kind} {name}")
        require(
            found[name] == size,
            f"the {kind} {folder / name} has {found[name]} bytes, and {size} when it was prepared",
        )


def file_digest(file: Path) -> str:
    """SHA-256 of the content of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def directory_digest(directory: Path) -> str:
    """SHA-256 of the names and contents of the files in a directory."""
    digests = (f"{file.name} {file_digest(file)}" for file in sorted(directory.iterdir()))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
