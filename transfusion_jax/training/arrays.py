"""A checkpoint read array by array, in the host's memory, without devices or the model.

Orbax keeps each tree of a checkpoint as Zarr arrays, named by their dotted paths, in one OCDBT
store. Restoring the tree would hold all of it at one time.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from transfusion_jax.errors import WorkFailed
from transfusion_jax.training.checkpoint import quieten_orbax, stored_progress
from transfusion_jax.training.storage_errors import as_line

MOST = 2 << 30
"""Bytes of an array that are held where its entries are read one after another."""


class DamagedArray(WorkFailed):
    """An array cannot be decoded, or the arrays are not those that were saved."""


@dataclass(frozen=True)
class StoredArrays:
    """The arrays of one tree (`ema`, `parameters`) of a checkpoint; each is read when asked for."""

    path: Path
    """Of the tree: `checkpoints/<step>/<tree>`."""
    shapes: dict[str, tuple[int, ...]]
    """By dotted name, in order of names."""

    def read(self, name: str) -> np.ndarray:
        """One array, float32; nothing of it is kept here.

        Raises:
          DamagedArray: it cannot be decoded.
        """
        return self._rows(name, 0, self.shapes[name][0])

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Its entries along axis 0, one after another, each a copy of its own.

        No more than MOST of the array is held at one time, if one entry is not more. A chunk is
        decoded as often as that takes.

        Raises:
          DamagedArray: it cannot be decoded.
        """
        for start, stop in self._ranges(name):
            # Copies, or the last of them would keep these while the next are read.
            yield from map(np.copy, self._rows(name, start, stop))

    def _ranges(self, name: str) -> Iterator[tuple[int, int]]:
        """Along axis 0, of MOST bytes each."""
        count, *entry = self.shapes[name]
        entries = max(1, MOST // (4 * math.prod(entry)))
        return ((start, min(start + entries, count)) for start in range(0, count, entries))

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries from `start` to `stop` along axis 0.

        Chunks (each a device's part) are read one after another: all at once, their encoded bytes
        would take as much memory as the array.
        """
        shape = (stop - start, *self.shapes[name][1:])
        array = np.empty(shape, np.float32)
        try:
            store = _open(self.path, name)
            for part in _chunks(shape, store.chunk_layout.read_chunk.shape, start):
                rows = slice(part[0].start - start, part[0].stop - start)
                array[(rows, *part[1:])] = store[part].read().result()
            return array
        except ValueError as error:
            raise DamagedArray(f"{name}: {as_line(error)}") from None

    def verify(self) -> None:
        """Reads all of them, one after another, and compares their checksum with the stored one.

        Raises:
          DamagedArray: it differs, or something cannot be decoded.
        """
        total = sum(
            int(np.sum(self._rows(name, *rows).view(np.uint32), dtype=np.uint64))
            for name in self.shapes
            for rows in self._ranges(name)
        )
        try:
            sums = stored_progress(self.path.parent)["checksum"]
            stored = int(np.asarray(sums[self.path.name]))
        except (KeyError, OSError, ValueError) as error:
            raise DamagedArray(f"{self.path.parent / 'progress'}: {as_line(error)}") from None
        if total % 2**32 != stored:
            raise DamagedArray(f"the checksum of {self.path} is wrong")


def stored_arrays(checkpoint: Path, tree: str) -> StoredArrays:
    """The arrays of a tree of the checkpoint in a directory.

    Raises:
      DamagedArray: what describes them cannot be read.
    """
    quieten_orbax()
    path = checkpoint.absolute() / tree
    try:
        described: dict[str, Any] = json.loads((path / "_METADATA").read_text())["tree_metadata"]
        names = sorted(
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in described.values()
        )
        return StoredArrays(path, {name: tuple(_open(path, name).shape) for name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArray(f"{path}: {as_line(error)}") from None


def _open(path: Path, name: str) -> tensorstore.TensorStore:
    store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    spec = {"driver": "zarr3", "kvstore": store}
    return tensorstore.open(spec, read=True, open=True).result()


def _chunks(
    shape: Sequence[int], chunk: Sequence[int], first: int = 0
) -> Iterator[tuple[slice, ...]]:
    """The parts of an array that are in one chunk each, of entries of this shape from `first` on
    along axis 0."""
    starts = [first, *(0 for _ in shape[1:])]
    ends = [start + size for start, size in zip(starts, shape, strict=True)]
    cuts = [
        [slice(max(a, at), min(b, at + step)) for at in range(a - a % step, b, step)]
        for a, b, step in zip(starts, ends, chunk, strict=True)
    ]
    return itertools.product(*cuts)
