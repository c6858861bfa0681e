"""Readers of JSON Lines, of folders of pictures, and of plain text."""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from transfusion_jax.preparation.readers.raw import (
    Picture,
    Raw,
    Rejected,
    digest_of,
    digest_of_file,
    document_of,
    file_of,
    json_of,
    text_of,
)

TEXT_PIECE = 1 << 20  # bytes of a text file in one document


class JsonLines:
    """JSON Lines, one document a line; files are named relative to the `.jsonl`.

    {"text": "..."}                                                         text
    {"file": "a.jpg", "caption": "..."}  or  "captions": ["...", "..."]     a pair
    {"spans": [{"image": "a.png"}, {"text": "remove it"}, {"image": "b.png"}]}     any mix; here an edit
    """

    def __init__(self, path: Path):
        self._path, self._folder = path, path.parent
        self._starts = line_starts(path)
        sizes = np.diff(self._starts)
        blank = [line for line in np.flatnonzero(sizes <= 2) if _is_blank(self._line(line))]
        self._lines = np.delete(np.arange(len(sizes)), blank)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Raw:
        line = int(self._lines[index])
        name = f"{self._path.name}:{line + 1}"
        return document_of(json_of(self._line(line), name), name, self._folder)

    def digest(self) -> str:
        return digest_of_file(self._path)

    def every(self) -> Iterator[Raw | Rejected]:
        """All items, in one pass."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                name = f"{self._path.name}:{number}"
                if _is_blank(line):
                    continue
                try:
                    yield document_of(json_of(line, name), name, self._folder)
                except Rejected as error:
                    yield error

    def _line(self, line: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._starts[line])
            return file.read(self._starts[line + 1] - self._starts[line])


def _is_blank(line: bytes) -> bool:
    return len(line) <= 2 and not line.strip()


class Captions:
    """A folder of pictures with `captions.jsonl`; lines that name the same picture are captions of one document."""

    def __init__(self, path: Path):
        self._lines, self._missing = JsonLines(path), set()
        keys = np.zeros(len(self._lines), np.uint64)
        for line, raw in enumerate(self._lines.every()):
            # A line that cannot be read is alone.
            name = f"\0{line}" if isinstance(raw, Rejected) else raw.name
            keys[line] = int.from_bytes(
                hashlib.sha256(name.encode(errors="backslashreplace")).digest()[:8]
            )
            if (
                not isinstance(raw, Rejected)
                and raw.captions
                and not os.path.isfile(path.parent / name)
            ):
                self._missing.add(name)
        _, first, document = np.unique(keys, return_index=True, return_inverse=True)
        document = np.argsort(np.argsort(first))[document]  # numbered by their first lines
        self._order = np.argsort(document, kind="stable")
        self._starts = np.searchsorted(document[self._order], np.arange(len(first) + 1))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Raw:
        first, *others = (
            self._lines[line] for line in self._order[self._starts[index] : self._starts[index + 1]]
        )
        return Raw(first.name, first.spans, sum((raw.captions for raw in others), first.captions))

    def digest(self) -> str:
        return self._lines.digest()

    def missing(self) -> list[str]:
        """Files that captions name and that are not there."""
        return sorted(name.encode(errors="backslashreplace").decode() for name in self._missing)


class SideBySide:
    """A folder of pictures, the caption of `a.jpg` in `a.txt`."""

    def __init__(self, folder: Path, pictures: Sequence[Path]):
        self._folder, self._pictures = folder, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Raw:
        path = self._pictures[index]
        name, caption = str(path.relative_to(self._folder)), path.with_suffix(".txt")
        if not caption.is_file():
            raise Rejected("no caption", name)
        return Raw(
            name, (Picture(functools.partial(file_of, path)),), (text_of(file_of(caption), name),)
        )

    def digest(self) -> str:
        return digest_of(
            *((str(path.relative_to(self._folder)), path.stat().st_size) for path in self._pictures)
        )


class TextFiles:
    """Text files, a document each; one longer than a MiB becomes several, parted after the ends of lines."""

    def __init__(self, files: Sequence[Path], folder: Path):
        self._folder = folder
        self._pieces: list[tuple[Path, int, int]] = []
        for file in files:
            size = file.stat().st_size
            starts = line_starts(file) if size > TEXT_PIECE else np.asarray([0, size])
            cuts = np.unique(
                [*starts[np.searchsorted(starts, np.arange(0, size, TEXT_PIECE))], size]
            )
            self._pieces += [(file, int(a), int(b)) for a, b in itertools.pairwise(cuts)] or [
                (file, 0, 0)
            ]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Raw:
        file, begin, end = self._pieces[index]
        name = str(file.relative_to(self._folder)) + (f" at byte {begin}" if begin else "")
        with file.open("rb") as opened:
            opened.seek(begin)
            return Raw(name, (text_of(opened.read(end - begin), name),))

    def digest(self) -> str:
        return digest_of(
            *((str(file.relative_to(self._folder)), *piece) for file, *piece in self._pieces)
        )


def line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the lines of a file, and its size; found in one pass, a block at a time."""
    starts, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    return np.unique(np.append(np.concatenate(starts), at))
