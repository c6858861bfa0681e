"""Sources: random access to documents, and the names by which an experiment asks for them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.digits import Digits
from transfusion_jax.data.documents import Document, pair_document, pair_length, text_document
from transfusion_jax.data.prepared import Prepared
from transfusion_jax.data.scenes import Scenes
from transfusion_jax.data.sums import Sums
from transfusion_jax.data.tokenizer import Tokenizer


class Source(Protocol):
    """What the packer and the pipeline ask of a source; it holds the documents of one split."""

    cut: bool | np.ndarray
    """Whether a row may cut a document, of each or of all: true for text only."""

    def texts(self) -> Iterable[str]:
        """Text to train a tokenizer on."""
        ...

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """Positions that each document takes at most, whatever is drawn for it."""
        ...

    def document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        """The document, its random choices drawn from `rng`."""
        ...


class Synthetic:
    """Noise with the lengths of web data, to measure a machine without any data: half pairs, half text."""

    count = 4096
    cut = np.repeat([False, True], count)

    def __init__(self, experiment: Experiment, split: str):
        self.experiment = experiment
        rng = np.random.default_rng(0 if split == "train" else 1)
        most = experiment.data.row_length - experiment.image.span - 2
        self.caption = np.clip(rng.lognormal(np.log(30), 0.5, self.count).astype(int), 1, most)
        self.text = np.clip(rng.lognormal(np.log(500), 1.0, self.count).astype(int), 1, 100_000)

    def texts(self) -> Iterator[str]:
        return iter(["synthetic text"])

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        pairs = [pair_length([range(n)], self.experiment.image.span) for n in self.caption]
        return np.asarray([*pairs, *(self.text + 2)])

    def document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        if index >= self.count:
            return text_document(rng.integers(tokenizer.boi, size=self.text[index - self.count]), tokenizer)
        ids = rng.integers(tokenizer.boi, size=self.caption[index])
        latent = rng.standard_normal(self.experiment.image.shape, np.float32)
        return pair_document([ids], latent, tokenizer, self.experiment.data, self.experiment.diffusion, rng)


SOURCES: dict[str, type[Source]] = {"digits": Digits, "scenes": Scenes, "sums": Sums, "synthetic": Synthetic}


def load_sources(experiment: Experiment, split: str) -> list[Source]:
    """The split "train" or "held_out" of every source of the experiment.

    Raises:
      ValueError: a source is unknown.
    """
    for name in (source.name for source in experiment.data.sources):
        if name not in SOURCES and not Path(name).is_dir():
            raise ValueError(f"source {name!r} is not one of {sorted(SOURCES)}, nor a directory of prepared data")
    return [
        SOURCES[name](experiment, split) if name in SOURCES else Prepared(Path(name), experiment, split)
        for name in (source.name for source in experiment.data.sources)
    ]
