"""Records: a prepared document as bytes, and the index that packing is planned from.

A record is a msgpack array `[captions, spans]`. Token ids are little-endian unsigned integers of
the data set's id type. `captions` are alternatives; a document that has them is a pair, and its one
span is the picture. A span is `[0, ids]` or `[1, image]`. An image is its pixels, uint8 [h, w, c],
the posterior of its latent, which is the mean and the standard deviation, float16 [2, h, w, c], or
code numbers of a VQ autoencoder, unsigned [h, w, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgpack
import numpy as np

TEXT = 0
IMAGE = 1

TRAIN = 0
HELD_OUT = 1
STRADDLING = 2
"""A document with pictures of both splits, so in neither (see `preparation/splits.py`)."""
SPLITS = {"train": TRAIN, "held_out": HELD_OUT}


@dataclass(frozen=True)
class Record:
    """One prepared document; images are as they are stored."""

    captions: tuple[np.ndarray, ...]
    spans: tuple[tuple[int, np.ndarray], ...]
    """(TEXT, ids) or (IMAGE, array)."""


class Index(NamedTuple):
    """An entry for every record, in order; all int32.

    A document of n images takes at most text + n * image.span + 2 positions.
    """

    text: np.ndarray
    """Text tokens, of the longest caption where there are several."""
    images: np.ndarray
    """Images."""
    split: np.ndarray
    """TRAIN, HELD_OUT or STRADDLING."""


def id_type(entries: int) -> np.dtype:
    """The smallest type that holds the ids of a tokenizer."""
    return np.dtype("<u2" if entries <= 1 << 16 else "<u4")


def encode(record: Record, ids: np.dtype) -> bytes:
    captions = [np.asarray(caption, ids).tobytes() for caption in record.captions]
    spans = [
        [kind, (np.asarray(x, ids) if kind == TEXT else x).tobytes()] for kind, x in record.spans
    ]
    return msgpack.packb([captions, spans])


def decode(data: bytes, ids: np.dtype, image: np.dtype, shape: Sequence[int]) -> Record:
    """The inverse of `encode`, for images of this type and shape; the arrays are views of
    `data`."""
    captions, spans = msgpack.unpackb(data)
    return Record(
        tuple(np.frombuffer(caption, ids) for caption in captions),
        tuple(
            (
                kind,
                np.frombuffer(x, ids) if kind == TEXT else np.frombuffer(x, image).reshape(shape),
            )
            for kind, x in spans
        ),
    )


def entry(record: Record) -> tuple[int, int]:
    """(text, images) of a record, as in `Index`."""
    text = sum(len(x) for kind, x in record.spans if kind == TEXT)
    text += max((len(caption) for caption in record.captions), default=0)
    return text, sum(kind == IMAGE for kind, _ in record.spans)
