"""Readers of JSON Lines: a document a line, or captions of pictures, several lines to a picture."""

import bisect
import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transfusion_jax.preparation.readers.collection import Scanned
from transfusion_jax.preparation.readers.documents import document_of
from transfusion_jax.preparation.readers.folder import Folder, read_at
from transfusion_jax.preparation.readers.raw import Columns, Picture, Raw, Rejected

BLOCK = 1 << 24
SHOWN = 5  # names of missing files that are kept
WHITESPACE = np.frombuffer(b" \t\r\n", np.uint8)


class Missing(NamedTuple):
    """Files that captions name and that are not there."""

    count: int
    names: tuple[str, ...]
    """A few of them."""


class JsonLines:
    """A `.jsonl`; files are named relative to it. Blank lines are no items."""

    def __init__(
        self, folder: Folder, file: str, columns: Columns, arrays: dict[str, np.ndarray]
    ) -> None:
        self._folder = folder
        self._file = file
        self._ignored = frozenset(columns.ignored)
        self._begin = arrays["begin"]
        self._blanks = arrays["blanks"]

    @staticmethod
    def scan(folder: Folder, file: str, columns: Columns) -> Scanned:
        """The index holds where lines begin, and how many items precede each blank line.

        Raises:
          Rejected: it cannot be read.
        """
        starts, digest = line_starts(folder, file)
        sizes = np.diff(starts)
        blank = np.zeros(len(sizes), bool)
        short = np.flatnonzero(sizes <= 2)
        if len(short):
            with folder.open(file, file) as opened:
                content = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
                characters = np.frombuffer(content, np.uint8)
                last = characters[starts[short + 1] - 1]
                first = characters[starts[short]]
                blank[short] = np.isin(first, WHITESPACE) & np.isin(last, WHITESPACE)
        begin = np.append(starts[:-1][~blank], starts[-1])
        arrays = {"begin": begin, "blanks": np.cumsum(~blank)[blank]}
        return Scanned(arrays, len(begin) - 1, digest)

    def __len__(self) -> int:
        return len(self._begin) - 1

    def __getitem__(self, index: int) -> Raw:
        name = self._name(index)
        begin, end = self._begin[index : index + 2].tolist()
        return self._document(self._folder.read_part(self._file, begin, end, name), name)

    def every(self) -> Iterator[Raw | Rejected]:
        """All items, in one pass."""
        with self._folder.open(self._file, self._file) as file:
            for index in range(len(self)):
                begin, end = self._begin[index : index + 2].tolist()
                name = self._name(index)
                try:
                    line = read_at(file, begin, end - begin, self._folder.max_bytes, name)
                    yield self._document(line, name)
                except Rejected as error:
                    yield error

    def _document(self, line: bytes, name: str) -> Raw:
        return document_of(line, name, self._folder, os.path.dirname(self._file), self._ignored)

    def _name(self, index: int) -> str:
        line = index + 1 + int(np.searchsorted(self._blanks, index, side="right"))
        return f"{self._file}:{line}"


class Captions:
    """A `captions.jsonl`: lines that name the same picture are captions of one document."""

    def __init__(
        self, folder: Folder, file: str, columns: Columns, arrays: dict[str, np.ndarray]
    ) -> None:
        self._lines = JsonLines(folder, file, columns, arrays)
        self._root = folder.root
        self._order = arrays["order"]
        self._starts = arrays["starts"]

    @staticmethod
    def scan(folder: Folder, file: str, columns: Columns) -> tuple[Scanned, Missing]:
        """The index of the lines, and which of them make a document; and which files are missing.

        Raises:
          Rejected: the file cannot be read.
        """
        arrays, _, digest = JsonLines.scan(folder, file, columns)
        lines = JsonLines(folder, file, columns, arrays)
        keys = np.zeros(len(lines), np.uint64)
        missing, shown = set(), []
        for line, raw in enumerate(lines.every()):
            pair = not isinstance(raw, Rejected) and raw.captions
            key = file_key(raw.name, folder.root) if pair else key_of(f"line {line}")
            keys[line] = key
            if pair and not _is_file(os.path.join(folder.root, raw.spans[0].file)):
                if key not in missing:
                    bisect.insort(shown, raw.name)
                    del shown[SHOWN:]
                missing.add(key)
        _, first, document = np.unique(keys, return_index=True, return_inverse=True)
        document = np.argsort(np.argsort(first))[document]  # numbered by their first lines
        arrays["order"] = np.argsort(document, kind="stable")
        arrays["starts"] = np.searchsorted(document[arrays["order"]], np.arange(len(first) + 1))
        return Scanned(arrays, len(first), digest), Missing(len(missing), tuple(shown))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Raw:
        numbers = self._order[self._starts[index] : self._starts[index + 1]]
        first, *others = (self._lines[line] for line in numbers.tolist())
        # Another file with the same key.
        if any(_place(raw.name, self._root) != _place(first.name, self._root) for raw in others):
            raise Rejected("name collision", first.name)
        return Raw(first.name, first.spans, sum((raw.captions for raw in others), first.captions))


def named_pictures(lines: JsonLines, root: Path) -> np.ndarray:
    """Keys of the files, relative to the input's folder, that the documents of lines name."""
    keys = []
    for raw in lines.every():
        if not isinstance(raw, Rejected):
            files = (span.file for span in raw.spans if isinstance(span, Picture))
            keys += [file_key(file, root) for file in files]
    return np.asarray(keys, np.uint64)


def file_key(file: str, root: Path) -> int:
    """A key of a file of the input's folder, in whatever way its name is spelt."""
    return key_of(_place(file, root))


def _place(file: str, root: Path) -> str:
    if "\0" in file:  # no file, and some versions of Python cut a path there
        return file
    folder, name = os.path.split(os.path.join(root, file))  # "a.png/" is no file
    return os.path.join(os.path.abspath(folder), name)


def key_of(text: str) -> int:
    """64 bits of a hash."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8])


def line_starts(folder: Folder, file: str) -> tuple[np.ndarray, str]:
    """Byte offsets of the lines of a file, and its size; and a digest of its content.

    Raises:
      Rejected: it cannot be read.
    """
    starts = [np.zeros(1, np.int64)]
    at = 0
    digest = hashlib.sha256()
    with folder.open(file, file) as opened:
        while block := opened.read(BLOCK):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
            digest.update(block)
    found = np.concatenate(starts)
    if found[-1] < at:  # the last line has no end
        found = np.append(found, at)
    return found, digest.hexdigest()


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a null byte
        return False
