"""A checkpoint read array by array, in the host's memory, without devices or the model.

Orbax keeps each tree of a checkpoint as Zarr arrays, named by their dotted paths, in one OCDBT
store. Restoring the tree would hold all of it at one time.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from transfusion_jax.training.checkpoint import quieten_orbax, stored_progress

# Chunks (each a device's part of an array) decoded at a time: the memory beside the array.
CONCURRENCY = {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 4}}


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

        Raises:
          DamagedArray: it cannot be decoded.
        """
        try:
            return np.asarray(_open(self.path, name).read().result(), np.float32)
        except ValueError as error:
            raise DamagedArray(f"{name} of {self.path}: {error}") from None

    def verify(self) -> None:
        """Reads all of them, one after another, and compares their checksum with the stored one.

        Raises:
          DamagedArray: it differs.
        """
        total = sum(
            int(np.sum(self.read(name).view(np.uint32), dtype=np.uint64)) for name in self.shapes
        )
        stored = int(np.asarray(stored_progress(self.path.parent)["checksum"][self.path.name]))
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
    except (OSError, ValueError, KeyError) as error:
        raise DamagedArray(f"{path}: {error}") from None


def _open(path: Path, name: str) -> tensorstore.TensorStore:
    store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}
    spec = {"driver": "zarr3", "kvstore": store, "context": CONCURRENCY}
    return tensorstore.open(spec, read=True, open=True).result()
