"""Safetensors in files of bounded size, written one tensor at a time.

model-00001-of-00002.safetensors   model-00002-of-00002.safetensors
model.safetensors.index.json       which tensor is in which file
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from transfusion_jax.files import write_json
from transfusion_jax.tensors import DTYPES, INDEX

LARGEST = 5 * 10**9
"""Bytes of a file, unless one tensor alone has more."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Described(NamedTuple):
    """A tensor before it is there."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_named(name: str) -> np.dtype:
    """The dtype of `--dtype`."""
    return np.dtype({"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[name])


def write_shards(
    out: Path,
    planned: Mapping[str, Described],
    values: Iterable[tuple[str, np.ndarray | Iterator[np.ndarray]]],
    largest: int = LARGEST,
) -> None:
    """Writes tensors and their index into a directory.

    Args:
      planned: every tensor by name.
      values: (name, array) of each, in the order of `planned`, or instead of the array an iterator
        over its parts along axis 0; each is cast to its dtype. One is asked for when the one before
        is written, and none is kept.
    """
    shards = _divided(planned, largest)
    files = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    arrays = iter(values)
    for file, names in zip(files, shards, strict=True):
        _write_shard(out / file, {name: planned[name] for name in names}, arrays)
    assert next(arrays, None) is None
    placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(described.nbytes for described in planned.values())
    write_json(out / f"model{INDEX}", {"metadata": {"total_size": total}, "weight_map": placed})


def _divided(planned: Mapping[str, Described], largest: int) -> list[list[str]]:
    """Names in order, cut where a file would become too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, described in planned.items():
        if shards[-1] and size + described.nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += described.nbytes
    return shards


def _write_shard(
    file: Path,
    planned: Mapping[str, Described],
    arrays: Iterator[tuple[str, np.ndarray | Iterator[np.ndarray]]],
) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, described in planned.items():
        start, end = end, end + described.nbytes
        header[name] = {
            "dtype": NAMES[described.dtype],
            "shape": list(described.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, described in planned.items():
            _write_tensor(opened, name, described, next(arrays))  # no name here keeps the array


def _write_tensor(
    opened: BinaryIO,
    name: str,
    described: Described,
    found: tuple[str, np.ndarray | Iterator[np.ndarray]],
) -> None:
    assert found[0] == name, (name, found[0])
    parts = found[1]
    if isinstance(parts, np.ndarray):
        assert parts.shape == described.shape, (name, parts.shape, described.shape)
        # A stacked array is cast layer by layer: two copies of it might not fit.
        parts = parts if parts.ndim > 2 else [parts]
    written = 0
    for part in parts:
        whole = np.ascontiguousarray(part, described.dtype)
        written += opened.write(whole.reshape(-1).view(np.uint8).data)
    assert written == described.nbytes, (name, written, described)
