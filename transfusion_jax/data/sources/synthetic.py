"""Noise with the lengths of web data: measures a machine without any data."""

from collections.abc import Iterator, Sequence

import numpy as np

from transfusion_jax.config import Experiment, ImageConfig
from transfusion_jax.data.documents import Document, pair_document, pair_length, text_document
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.tokenizer import Tokenizer

PAIRS = 4096


class Synthetic:
    """Pairs and pages of noise with the lengths of web data, mixed 1:1 (section 4.1).

    Half of all positions are patches, the other half text: captions, pages, and the marks around
    both. For a model of text alone there are pages alone. (Images of fewer than six patches are
    outnumbered by the marks and the caption of their pair.) Captions have about 30 tokens, or an
    eighth of the patches if that is less; pages 500.
    """

    def __init__(self, experiment: Experiment, split: str):
        self.experiment = experiment
        self.assets = Assets(codes=experiment.image.codes)
        image, data = experiment.image, experiment.data
        rng = np.random.default_rng(0 if split == "train" else 1)
        typical = min(30, image.patches / 8)
        pairs = 0 if experiment.model.images == "none" else PAIRS
        captions = rng.lognormal(np.log(typical), 0.5, pairs).astype(int)
        self.captions = np.clip(captions, 1, data.row_length - image.span - 2)
        kept = self.captions.sum() * (1 - (1 - data.image_first) * data.caption_dropout)
        in_pairs = int(kept) + 4 * pairs  # BOS, BOI, EOI, EOS
        self.pages = _page_lengths(rng, image.patches * PAIRS - in_pairs)
        self.splittable = np.repeat([False, True], [pairs, len(self.pages)])

    def texts(self) -> Iterator[str]:
        return iter(["synthetic text"])

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        span = self.experiment.image.span
        return np.asarray([*(pair_length([range(n)], span) for n in self.captions), *self.pages])

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [self._document(index, tokenizer, rng) for index in indices]

    def _document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        if index >= len(self.captions):
            count = self.pages[index - len(self.captions)] - 2
            return text_document(rng.integers(tokenizer.boi, size=count), tokenizer)
        ids = rng.integers(tokenizer.boi, size=self.captions[index])
        latent = _latent(self.experiment.image, rng)
        return pair_document(
            [ids], latent, tokenizer, self.experiment.data, self.experiment.diffusion, rng
        )


def _latent(image: ImageConfig, rng: np.random.Generator) -> np.ndarray:
    """Noise, or random codes."""
    if image.codes:
        return rng.integers(image.codes, size=image.shape).astype(np.float32)
    return rng.standard_normal(image.shape, np.float32)


def _page_lengths(rng: np.random.Generator, positions: int) -> np.ndarray:
    """Web-like lengths, BOS and EOS included, of pages that take this many positions together."""
    count = max(positions, 0) // 400 + 32  # twice as many as needed: a page has 826 on average
    lengths = np.clip(rng.lognormal(np.log(500), 1.0, count).astype(int), 1, 100_000) + 2
    lengths = np.diff(np.clip(np.cumsum(lengths), 0, max(positions, 0)), prepend=0)
    return lengths[lengths > 2]
