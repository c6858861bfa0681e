"""Many files of one kind as one reader."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.names import Names
from transfusion_jax.preparation.readers.raw import Columns, Raw, Reader, Rejected, digest_of

OPEN = 64  # readers of single files that are kept open

Arrays = dict[str, np.ndarray]
Each = Callable[[Callable, Iterable], Iterable]
"""`map`, or the like of it on several processes."""


class Scanned(NamedTuple):
    """What reading a file once tells about it."""

    arrays: Arrays
    """The index that its reader is opened with."""
    items: int
    digest: str
    """Changes when the file does, as far as that can be told without reading all of it."""


class FileReader(Protocol):
    """A reader of one file, with the index that `scan` made of it."""

    def __init__(self, folder: Folder, file: str, columns: Columns, arrays: Arrays) -> None: ...

    @staticmethod
    def scan(folder: Folder, file: str, columns: Columns) -> Scanned:
        """Raises Rejected or ValueError if the file cannot be read."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Raw: ...


class Collection:
    """The items of many files, which are opened when they are asked for.

    The indexes of all files are kept one after another: `x_starts` says where that of each file
    begins in the array `x`.
    """

    def __init__(
        self, kind: type[FileReader], folder: Folder, columns: Columns, arrays: Arrays
    ) -> None:
        self._items = arrays["items"]
        open_file = functools.partial(_open, kind, folder, columns, arrays)
        self.reader: Callable[[int], Reader] = functools.lru_cache(maxsize=OPEN)(open_file)
        """The reader of a file, by its number."""

    @staticmethod
    def scan(
        kind: type[FileReader], folder: Folder, files: Sequence[str], columns: Columns, each: Each
    ) -> tuple[Arrays, str]:
        """The indexes of all files, and a digest.

        Raises:
          ValueError: a file cannot be read.
        """
        scanned = list(each(functools.partial(_scan, kind, folder, columns), files))
        names = Names.of(files)
        together: Arrays = {
            "names": names.content,
            "name_starts": names.starts,
            "items": np.cumsum([0, *(file.items for file in scanned)], dtype=np.int64),
        }
        for key in scanned[0].arrays:
            parts = [file.arrays[key] for file in scanned]
            together[key] = np.concatenate(parts)
            together[f"{key}_starts"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return together, digest_of(*(file.digest for file in scanned))

    def __len__(self) -> int:
        return int(self._items[-1])

    def __getitem__(self, index: int) -> Raw:
        file = int(np.searchsorted(self._items, index, side="right")) - 1
        return self.reader(file)[index - int(self._items[file])]


def _open(
    kind: type[FileReader], folder: Folder, columns: Columns, arrays: Arrays, file: int
) -> Reader:
    """The reader of one file, with its part of the indexes."""
    own = {}
    for key, array in arrays.items():
        if (starts := arrays.get(f"{key}_starts")) is not None:
            own[key] = array[starts[file] : starts[file + 1]]
    return kind(folder, Names(arrays["names"], arrays["name_starts"])[file], columns, own)


def _scan(kind: type[FileReader], folder: Folder, columns: Columns, file: str) -> Scanned:
    try:
        return kind.scan(folder, file, columns)
    except Rejected as error:
        raise ValueError(f"cannot read {folder.root / file}: {error.reason}") from error
