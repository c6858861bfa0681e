"""Handwritten digits: the 1,797 real 8x8 pictures that ship inside scikit-learn, with captions."""

from collections.abc import Iterator, Sequence

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, pair_document, pair_length
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.sources.sums import NUMBERS
from transfusion_jax.data.tokenizer import Tokenizer

TRAIN = 1500
CAPTIONS = ("a handwritten {}", "the digit {}", "a drawing of a {}", "{} written by hand")


def captions(label: int) -> list[str]:
    """All wordings for a picture of `label`."""
    return [wording.format(NUMBERS[label]) for wording in CAPTIONS]


def label_of(caption: str) -> int | None:
    """The digit that a caption names; None unless it is one of the wordings, to the letter."""
    return next((label for label in range(10) if caption in captions(label)), None)


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 8, 8, 1] in [-1, 1], ink positive, and labels [n].

    Split "train" has 1,500, "held_out" the other 297.
    """
    from sklearn.datasets import load_digits  # a second, which other data should not cost

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    chosen = order[:TRAIN] if split == "train" else order[TRAIN:]
    return (data.images[chosen, :, :, None] / 8.0 - 1.0).astype(np.float32), data.target[chosen]


class Digits:
    """Pairs of a picture and one of its wordings."""

    assets = Assets()
    splittable = False

    def __init__(self, experiment: Experiment, split: str):
        self.experiment = experiment
        self.images, self.labels = load(split)
        if self.images.shape[1:] != experiment.image.shape:
            raise ValueError(
                f"the digits are {self.images.shape[1:]} pictures, "
                f"image says {experiment.image.shape}"
            )

    def texts(self) -> Iterator[str]:
        return (text for label in self.labels for text in captions(label))

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        longest = [
            pair_length(self._ids(label, tokenizer), self.experiment.image.span)
            for label in range(10)
        ]
        return np.asarray(longest)[self.labels]

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [self._document(index, tokenizer, rng) for index in indices]

    def _document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        ids = self._ids(self.labels[index], tokenizer)
        return pair_document(
            ids, self.images[index], tokenizer, self.experiment.data, self.experiment.diffusion, rng
        )

    def _ids(self, label: int, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(text) for text in captions(label)]
