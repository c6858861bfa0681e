"""Safetensors files read by pieces: a mapped file is no memory until a part of it is copied.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and
place of every tensor), the tensors. Several files have an index, `*.safetensors.index.json`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transfusion_jax.errors import require

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Safetensors' names of the dtypes that weights have."""
INDEX = ".safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a header that is not one may raise."""
DIMENSIONS = 32  # of an array, in any version of NumPy
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package


def open_tensors(source: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, or of a directory of them, by name; mapped, read-only.

    Raises:
      ValueError: there are none, a file is damaged, or one that the index names is missing.
    """
    files, index = _files(source)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        for name, tensor in _mapped(file).items():
            require(name not in tensors, f"{file}: {name} is in another file too")
            tensors[name] = tensor
    missing = sorted(index - tensors.keys())
    require(not missing, f"{source}: the index names {missing[:1]}, which no file holds")
    return tensors


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], problem: str
) -> None:
    """Raises ValueError with `problem`, and the first three names and shapes that do not fit."""
    wrong = [
        f"{name} {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    require(not wrong, f"{problem}: {'; '.join(wrong[:3])}{more}")


def finite(name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor, all of whose numbers are finite.

    Raises:
      ValueError: one is not.
    """
    require(bool(np.all(np.isfinite(tensor))), f"{name} has numbers that are not finite")
    return tensor


def _files(source: Path) -> tuple[list[Path], set[str]]:
    """The files, and the tensors that an index says are in them."""
    require(source.exists(), f"no such file or directory: {source}")
    if source.is_file():
        require(source.suffix == ".safetensors", _no_weights(source, [source.name]))
        return [source], set()
    if indices := sorted(source.glob(f"*{INDEX}")):
        try:
            placed = dict(json.loads(indices[0].read_text())["weight_map"])
            names = sorted(set(placed.values()))
            outside = [name for name in names if name != Path(name).name]
            require(not outside, f"{outside[:1]} is not the name of a file beside it")
            files = [source / name for name in names]
        except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{indices[0]} is not an index of safetensors: {error}") from None
        for file in files:
            require(file.is_file(), f"{indices[0]} names {file.name}, which is not there")
        return files, set(placed)
    files = sorted(x for x in source.glob("*.safetensors") if x.is_file())
    require(bool(files), _no_weights(source, sorted(x.name for x in source.iterdir())))
    return files, set()


def _no_weights(source: Path, names: list[str]) -> str:
    pickled = [name for name in names if Path(name).suffix in PICKLED]
    if not pickled:
        return f"no safetensors in {source}"
    return (
        f"{source}: {pickled[0]} is a pickle, which can run code, and is not read; convert it "
        "where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        '"model.safetensors")'
    )


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
      ValueError: it is damaged, or holds a dtype that weights do not have.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        require(
            8 <= size - length and length <= LONGEST_HEADER,
            f"{file} is damaged: {size} bytes do not hold a header of {length}",
        )
        header = opened.read(length)
    try:
        described: dict[str, Any] = json.loads(header)
        described.pop("__metadata__", None)
        places = {name: _place(entry) for name, entry in described.items()}
    except DAMAGE as error:
        raise ValueError(f"{file} is damaged: its header cannot be read ({error})") from None
    held, needed = size - 8 - length, 0
    for name, (*_, start, end) in sorted(places.items(), key=lambda place: place[1][2:]):
        require(start == needed, f"{file} is damaged: {name} begins at {start}, not at {needed}")
        needed = end
    require(needed == held, f"{file} is damaged: {held} bytes of tensors, its header says {needed}")
    mapped = np.memmap(file, np.uint8, "r", offset=8 + length) if held else np.zeros(0, np.uint8)
    return {
        name: mapped[start:end].view(dtype).reshape(shape)
        for name, (dtype, shape, start, end) in places.items()
    }


def _place(entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, start and end of a tensor."""
    name, shape = entry["dtype"], tuple(map(int, entry["shape"]))
    start, end = map(int, entry["data_offsets"])
    require(name in DTYPES, f"dtype {name} is not one of {', '.join(DTYPES)}")
    size = math.prod(shape) * DTYPES[name].itemsize
    require(min(shape, default=0) >= 0 and 0 <= start, "a negative size")
    require(len(shape) <= DIMENSIONS, f"a tensor of {len(shape)} dimensions")
    require(end - start == size, f"{end - start} bytes for {name} {list(shape)}")
    return DTYPES[name], shape, start, end
