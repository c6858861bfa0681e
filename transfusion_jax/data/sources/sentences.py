"""Sentences: a source of text alone, each sentence a document."""

from collections.abc import Iterator, Sequence

import numpy as np

from transfusion_jax.data.documents import Document, text_document
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.tokenizer import Tokenizer


class Sentences:
    """The sentences that it is given."""

    assets = Assets()
    splittable = True

    def __init__(self, sentences: Sequence[str]):
        self.sentences = sentences

    def texts(self) -> Iterator[str]:
        return iter(self.sentences)

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.asarray([len(tokenizer.encode(text)) + 2 for text in self.sentences])

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [text_document(tokenizer.encode(self.sentences[i]), tokenizer) for i in indices]
