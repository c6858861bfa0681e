"""A source: random access to the documents of one split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from transfusion_jax.data.documents import Document
from transfusion_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class LatentSpace:
    """What latents are latents of. A model is fed `(latent - shift) * scale`."""

    autoencoder: str
    """Digest of the autoencoder's configuration and weights."""
    scale: float
    shift: float
    directory: Path
    """Holds the autoencoder, with this scale and shift."""


@dataclass(frozen=True)
class Assets:
    """What a source has beside its documents; the defaults are for documents made by code."""

    digest: bytes = b""
    """Changes when the stored documents change."""
    tokenizer: Tokenizer | None = None
    """The tokenizer that its text is stored with, if its text is stored as ids."""
    latents: LatentSpace | None = None
    """Of latents and of codes; None where images are pixels."""
    plans: Path | None = None
    """Where packing plans of this split may be cached; another where lengths would be others."""
    codes: int = 0
    """Entries of the codebook whose code numbers the images are; 0: pixels or latents."""


class Source(Protocol):
    """The documents of one split, numbered from 0, and what training asks about them."""

    assets: Assets
    splittable: bool | np.ndarray
    """Whether a row may cut a document, for each or for all: only documents of text alone."""

    def texts(self) -> Iterable[str]:
        """Text to train a tokenizer on; none where `assets` has a tokenizer."""
        ...

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        """The most positions that each document can take, whatever is drawn for it."""
        ...

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        """These documents, in this order, with their random choices drawn from `rng`."""
        ...
