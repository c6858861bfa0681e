"""A source: random access to the documents of one split."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from transfusion_jax.data.documents import Document
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
