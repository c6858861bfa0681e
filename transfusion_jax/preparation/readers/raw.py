"""Raw documents, and how they are made out of bytes and JSON."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Rejected(Exception):
    """An item that cannot become a document: a reason that is counted, its name, and what may be looked at."""

    def __init__(self, reason: str, name: str, content: bytes = b""):
        super().__init__(f"{reason}: {name}")
        name = name.encode(
            errors="backslashreplace"
        ).decode()  # JSON and file systems have names that are no text
        self.reason, self.name, self.content = reason, name, content


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet; `load` raises Rejected if it is not there."""

    load: Callable[[], bytes]


@dataclass(frozen=True)
class Raw:
    """One document before preparation: a picture with `captions`, or spans of text and pictures."""

    name: str
    spans: tuple[str | Picture, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Names of the columns of Parquet and of the features of TFDS data."""

    image: str = "image"
    caption: str = "caption"
    text: str = "text"


class Reader(Protocol):
    """Items of one input, in an order that does not change."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Raw:
        """Raises Rejected."""
        ...

    def digest(self) -> str:
        """Of what it holds, as far as that can be told without reading all of it: changed inputs have another."""
        ...


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


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document_of(value: Any, name: str, folder: Path) -> Raw:
    """The document of one JSON object (see `JsonLines`); raises Rejected."""
    if not isinstance(value, dict):
        raise Rejected("not a document", name, json.dumps(value).encode())
    file = value.get("file", value.get("image"))
    if isinstance(file, str) and file:
        return Raw(
            file, (Picture(functools.partial(file_of, folder / file)),), captions_of(value, file)
        )
    if isinstance(spans := value.get("spans"), list) and spans:
        return Raw(name, tuple(_span(span, name, folder) for span in spans))
    if "text" in value:
        return Raw(name, (string_of(value["text"], name),))
    raise Rejected("not a document", name, json.dumps(value, ensure_ascii=False).encode())


def _span(value: Any, name: str, folder: Path) -> str | Picture:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    if isinstance(value, dict) and isinstance(value.get("image"), str):
        return Picture(functools.partial(file_of, folder / value["image"]))
    raise Rejected("not a document", name, json.dumps(value).encode())


def captions_of(value: Any, name: str) -> tuple[str, ...]:
    """The captions of an object with `caption`, `captions` or `text`: a string or a list of strings."""
    value = value if isinstance(value, dict) else {}
    found = next(
        (value[key] for key in ("caption", "captions", "text") if value.get(key) is not None), None
    )
    if found is None or found == []:
        raise Rejected("no caption", name)
    return tuple(
        string_of(caption, name) for caption in (found if isinstance(found, list) else [found])
    )


def string_of(value: Any, name: str) -> str:
    if isinstance(value, bytes):
        return text_of(value, name)
    if not isinstance(value, str):
        raise Rejected("not text", name, repr(value).encode())
    return value


def text_of(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", name, content) from error


def json_of(content: bytes, name: str) -> Any:
    text = text_of(content, name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("invalid JSON", name, content) from error


def file_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ValueError) as error:  # a ValueError: no file can have such a name
        raise Rejected("missing file", path.name) from error
    except OSError as error:
        raise Rejected("unreadable file", path.name) from error
