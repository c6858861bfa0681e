"""Readers of JSON Lines, of folders of pictures, and of plain text."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfusion_jax.data.readers.raw import Picture, Raw, Rejected, document_of, file_of, json_of, text_of

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
        blank = [line for line in np.flatnonzero(sizes <= 2) if not self._line(line).strip()]
        self._lines = np.delete(np.arange(len(sizes)), blank)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Raw:
        line = int(self._lines[index])
        name = f"{self._path.name}:{line + 1}"
        return document_of(json_of(self._line(line), name), name, self._folder)

    def _line(self, line: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._starts[line])
            return file.read(self._starts[line + 1] - self._starts[line])


class Captions:
    """A folder of pictures with `captions.jsonl`; lines that name the same picture are captions of one document."""

    def __init__(self, path: Path):
        self._folder = path.parent
        self._items: list[Raw | Rejected] = []
        documents: dict[str, int] = {}
        self._files: set[str] = set()
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                raw = document_of(json_of(line, f"{path.name}:{number}"), f"{path.name}:{number}", self._folder)
            except Rejected as error:
                self._items.append(error)
                continue
            if raw.captions:
                self._files.add(raw.name)
            at = documents.setdefault(raw.name, len(self._items))
            if at == len(self._items):
                self._items.append(raw)
            elif raw.captions:
                first = self._items[at]
                self._items[at] = Raw(first.name, first.spans, first.captions + raw.captions)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Raw:
        if isinstance(item := self._items[index], Rejected):
            raise Rejected(item.reason, item.name, item.content)
        return item

    def missing(self) -> list[str]:
        """Files that captions name and that are not there."""
        return sorted(name for name in self._files if not (self._folder / name).is_file())


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
        return Raw(name, (Picture(functools.partial(file_of, path)),), (text_of(file_of(caption), name),))


class TextFiles:
    """Text files, a document each; one longer than a MiB becomes several, parted after the ends of lines."""

    def __init__(self, files: Sequence[Path], folder: Path):
        self._folder = folder
        self._pieces: list[tuple[Path, int, int]] = []
        for file in files:
            size = file.stat().st_size
            starts = line_starts(file) if size > TEXT_PIECE else np.asarray([0, size])
            cuts = np.unique([*starts[np.searchsorted(starts, np.arange(0, size, TEXT_PIECE))], size])
            self._pieces += [(file, int(a), int(b)) for a, b in itertools.pairwise(cuts)] or [(file, 0, 0)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> Raw:
        file, begin, end = self._pieces[index]
        name = str(file.relative_to(self._folder)) + (f" at byte {begin}" if begin else "")
        with file.open("rb") as opened:
            opened.seek(begin)
            return Raw(name, (text_of(opened.read(end - begin), name),))


def line_starts(path: Path) -> np.ndarray:
    """Byte offsets of the lines of a file, and its size; found in one pass, a block at a time."""
    starts, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    return np.unique(np.append(np.concatenate(starts), at))
