"""A checkpoint read array by array, in the host's memory, without devices or the model.

Orbax keeps each tree of a checkpoint as Zarr arrays, named by their dotted paths, in one OCDBT
store. Restoring the tree would hold all of it at one time.
"""

import itertools
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from transfusion_jax.training.checkpoint import quieten_orbax, stored_progress
from transfusion_jax.training.storage_errors import as_line


class DamagedArray(Exception):
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

        Its chunks (each a device's part) are decoded one after another, each straight to its place:
        a second copy of one would be much where few devices cut a large array.

        Raises:
          DamagedArray: it cannot be decoded.
        """
        array = np.empty(self.shapes[name], np.float32)
        try:
            store = _open(self.path, name)
            places = tensorstore.array(array, copy=False, write=True)
            for part in _chunks(store.shape, store.chunk_layout.read_chunk.shape):
                places[part].write(store[part]).result()
            return array
        except ValueError as error:
            raise DamagedArray(f"{name}: {as_line(error)}") from None

    def verify(self) -> None:
        """Reads all of them, one after another, and compares their checksum with the stored one.

        Raises:
          DamagedArray: it differs, or something cannot be decoded.
        """
        total = sum(
            int(np.sum(self.read(name).view(np.uint32), dtype=np.uint64)) for name in self.shapes
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


def _chunks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The parts of an array of this shape that its chunks are."""
    starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        ends = map(operator.add, corner, chunk)
        yield tuple(slice(a, min(b, n)) for a, b, n in zip(corner, ends, shape, strict=True))
