"""Readers of WebDataset tar files, of Parquet, and of tensorflow-datasets."""

import functools
import io
import tarfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from transfusion_jax.data.readers.raw import (
    PICTURES,
    Columns,
    Picture,
    Raw,
    Rejected,
    captions_of,
    json_of,
    string_of,
    text_of,
)


class WebDataset:
    """A tar file of samples. Damaged members are items too, so that they are counted.

    Raises:
      ValueError: it holds no file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self._damaged: list[int] = []
        size, found = path.stat().st_size, {}
        for member in self._members(size):
            stem, dot, ending = Path(member.name).name.partition(".")
            found.setdefault(str(Path(member.name).parent / stem), {})[f".{ending}".lower()] = (
                member.offset_data, member.size,
            )  # fmt: skip
        self._samples, self._size = list(found.items()), size
        if not found:
            raise ValueError(f"{path} is no tar file that can be read (a compressed one has to be unpacked)")

    def _members(self, size: int) -> Iterator[tarfile.TarInfo]:
        """Files of the tar; after a damaged header, those that can still be made out."""
        with self._path.open("rb") as file:
            end = yield from _tar_members(file, 0)
            file.seek(end)
            rest = file.read(tarfile.BLOCKSIZE)
            if end > size or rest == bytes(tarfile.BLOCKSIZE):
                return  # at the end mark, or inside a member that was cut and will say so
            self._damaged.append(end)
            if rest:
                yield from _tar_members(file, end + tarfile.BLOCKSIZE)

    def __len__(self) -> int:
        return len(self._samples) + len(self._damaged)

    def __getitem__(self, index: int) -> Raw:
        if index >= len(self._samples):
            where = f"{self._path.name} at byte {self._damaged[index - len(self._samples)]}"
            raise Rejected("bad tar member", where)
        stem, members = self._samples[index]
        name = f"{self._path.name}/{stem}"
        picture = next((ending for ending in members if ending.endswith(PICTURES)), None)
        if picture is None:
            raise Rejected("no image", name)
        if ".txt" in members:
            captions = (text_of(self._member(members[".txt"], name), name),)
        elif ".json" in members:
            captions = captions_of(json_of(self._member(members[".json"], name), name), name)
        else:
            raise Rejected("no caption", name)
        return Raw(name, (Picture(functools.partial(self._member, members[picture], name)),), captions)

    def _member(self, place: tuple[int, int], name: str) -> bytes:
        if sum(place) > self._size:
            raise Rejected("truncated file", name)
        with self._path.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])


class Parquet:
    """A Parquet file with an image and a caption column, or with a text column.

    Images are bytes, or structs with `bytes`, as Hugging Face writes them; captions are strings or lists of strings.

    Raises:
      ValueError: it cannot be read, or has not the columns.
    """

    def __init__(self, path: Path, columns: Columns):
        import pyarrow
        import pyarrow.parquet

        self._path, self._columns = path, columns
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error
        names = self._file.schema_arrow.names
        self._pairs = columns.image in names
        if (wanted := columns.caption if self._pairs else columns.text) not in names:
            asked = wanted if self._pairs else f"{columns.image} or {columns.text}"
            raise ValueError(f"{path} has no column {asked}, only {', '.join(names)}")
        metadata = self._file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Raw:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row, name = int(index - self._starts[group]), f"{self._path.name}:{index}"
        if not self._pairs:
            return Raw(name, (string_of(_column(self._file, group, self._columns.text)[row].as_py(), name),))
        captions = captions_of({"caption": _column(self._file, group, self._columns.caption)[row].as_py()}, name)
        return Raw(name, (Picture(functools.partial(self._image, group, row, name)),), captions)

    def _image(self, group: int, row: int, name: str) -> bytes:
        value = _column(self._file, group, self._columns.image)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise Rejected("no image", name)
        return value


class TensorflowDatasets:
    """A data set of tensorflow-datasets through `tfds.data_source`, which needs no TensorFlow.

    Raises:
      ValueError: the package or the data set is not there, or has not the features.
    """

    def __init__(self, name: str, columns: Columns):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(f"reading {name} needs the package tensorflow-datasets") from error
        _, dataset, *split = name.split(":")
        try:
            self._source = tfds.data_source(dataset, split=split[0] if split else "train", download=False)
        except Exception as error:  # every kind of absence raises something else
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"cannot open {name}, which must be prepared as array_record: {said}") from error
        features = self._source.dataset_info.features
        self._name, self._columns, self._pairs = dataset, columns, columns.image in features
        if (wanted := columns.caption if self._pairs else columns.text) not in features:
            asked = wanted if self._pairs else f"{columns.image} or {columns.text}"
            raise ValueError(f"{name} has no feature {asked}, only {', '.join(features)}")
        self._labels = getattr(features[wanted], "names", None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Raw:
        example, name = self._source[index], f"{self._name}:{index}"
        if not self._pairs:
            return Raw(name, (string_of(example[self._columns.text], name),))
        value = example[self._columns.caption]
        captions = captions_of({"caption": self._labels[int(value)] if self._labels else value}, name)
        return Raw(name, (Picture(lambda: _png(example[self._columns.image])),), captions)


def _png(pixels: Any) -> bytes:
    """A decoded picture as a file again, so that every picture takes the same way."""
    if isinstance(pixels, bytes):
        return pixels
    pixels, file = np.asarray(pixels), io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png", compress_level=0)
    return file.getvalue()


def _tar_members(file: BinaryIO, start: int) -> Generator[tarfile.TarInfo, None, int]:
    """Files of a tar from `start` on; returns where reading ended. Past its beginning, what is no header is skipped."""
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=start > 0)
    except tarfile.TarError:
        return start
    try:
        yield from (member for member in tar if member.isfile())
    except tarfile.TarError:
        pass
    return tar.offset


_reading = threading.Lock()


@functools.lru_cache(maxsize=8)
def _read_column(file: Any, group: int, name: str) -> Any:
    return file.read_row_group(group, columns=[name]).column(0)


def _column(file: Any, group: int, name: str) -> Any:
    """One column of one row group of a Parquet file, read once though threads ask for its rows."""
    with _reading:
        return _read_column(file, group, name)
