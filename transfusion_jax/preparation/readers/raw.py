"""Raw documents: what readers give, before any text is tokenized and any picture decoded."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
"""Endings of the pictures that are read."""
OTHER_PICTURES = (
    ".apng .avif .cr2 .dds .dng .emf .eps .heic .heif .icns .ico .j2k .jfif .jp2 .jpe .jpx "
    ".jxl .nef .pbm .pcx .pgm .pnm .ppm .psd .svg .tga .tif .tiff .wmf .xbm .xpm"
).split()
"""Endings of pictures that are not read; an item that has one is rejected, and so counted."""
LONGEST_NAME = 1000  # characters of an item's name that are reported


class Rejected(Exception):
    """An item that cannot become a document: why, its name, and content to look at."""

    def __init__(self, reason: str, name: str, content: bytes = b""):
        super().__init__(f"{reason}: {name}")
        # Names in JSON and on file systems may be invalid Unicode, and as long as they like.
        self.name = name[:LONGEST_NAME].encode(errors="backslashreplace").decode()
        self.reason = reason
        self.content = content


@dataclass(frozen=True)
class Picture:
    """A picture that has not been read; `load` raises Rejected if it cannot be."""

    load: Callable[[], bytes]
    file: str = ""
    """Its name, relative to the input's folder, where it is a file of its own."""


@dataclass(frozen=True)
class Raw:
    """One document: a picture with `captions`, or spans of text and pictures."""

    name: str
    spans: tuple[str | Picture, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Names of the columns of Parquet files and of the features of TFDS data."""

    image: str = "image"
    """Column of pictures. Without it, the data is text alone."""
    caption: str = "caption"
    """Column of captions: strings, or lists of strings, one of which is drawn each epoch."""
    text: str = "text"
    """Column of text documents, where there is no column of pictures."""
    ignored: tuple[str, ...] = ()
    """Columns, keys of JSON objects, and endings in tars (`thumb` for `1.thumb.jpg`), that are left
    out although they hold pictures or text. Without this, data with a picture that nothing names is
    refused or rejected."""


class Reader(Protocol):
    """Items of one input, in an order that does not change."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Raw:
        """Raises Rejected."""
        ...


def is_picture(name: str) -> bool:
    """Whether a name ends as those of pictures do, whether they can be read or not."""
    return name.lower().endswith((*PICTURES, *OTHER_PICTURES))


def string_of(value: Any, name: str) -> str:
    """A value of a column or of JSON as text; raises Rejected if it is none."""
    if isinstance(value, bytes):
        return text_of(value, name)
    if not isinstance(value, str):
        raise Rejected("not text", name, repr(value).encode(errors="backslashreplace"))
    return value


def text_of(content: bytes, name: str) -> str:
    """UTF-8 as text, a byte-order mark left out; raises Rejected if it is invalid."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", name, content) from error


def digest_of(*parts: Any) -> str:
    """SHA-256 of the reprs of some plain values, or of bytes and arrays themselves."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part
            if isinstance(part, bytes | np.ndarray)
            else repr(part).encode(errors="backslashreplace")
        )
    return digest.hexdigest()
