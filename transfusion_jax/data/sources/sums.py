"""Sums in words: a text-only source whose right continuation is known."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, text_document
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.tokenizer import Tokenizer

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
LARGEST = 10
HELD_OUT = 12
"""Pairs of the 121 that training never shows, in any wording."""
WORDINGS = ("{} plus {} is", "the sum of {} and {} is", "adding {} and {} gives")


def problems(split: str) -> list[tuple[str, str]]:
    """(prompt, answer) in every wording, of the pairs of "train" or "held_out": ("two plus three is", "five")."""
    pairs = list(itertools.product(range(LARGEST + 1), repeat=2))
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    return [
        (wording.format(NUMBERS[a], NUMBERS[b]), NUMBERS[a + b])
        for a, b in (pairs[i] for i in sorted(chosen))
        for wording in WORDINGS
    ]


class Sums:
    """Each sum, in each wording, is a document."""

    assets = Assets()
    splittable = True

    def __init__(self, experiment: Experiment, split: str):
        self.sentences = [f"{prompt} {answer}" for prompt, answer in problems(split)]

    def texts(self) -> Iterator[str]:
        return iter(self.sentences)

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.asarray([len(tokenizer.encode(text)) + 2 for text in self.sentences])

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [self._document(index, tokenizer, rng) for index in indices]

    def _document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        return text_document(tokenizer.encode(self.sentences[index]), tokenizer)
