"""Noise with the lengths of web data: measures a machine without any data."""

from collections.abc import Iterator, Sequence

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, pair_document, pair_length, text_document
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.tokenizer import Tokenizer


class Synthetic:
    """Noise with the lengths of web data, to measure a machine without any data: half pairs, half text."""

    count = 4096
    assets = Assets()
    splittable = np.repeat([False, True], count)

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

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [self._document(index, tokenizer, rng) for index in indices]

    def _document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        if index >= self.count:
            return text_document(
                rng.integers(tokenizer.boi, size=self.text[index - self.count]), tokenizer
            )
        ids = rng.integers(tokenizer.boi, size=self.caption[index])
        latent = rng.standard_normal(self.experiment.image.shape, np.float32)
        return pair_document(
            [ids], latent, tokenizer, self.experiment.data, self.experiment.diffusion, rng
        )
