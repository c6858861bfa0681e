"""Readers of WebDataset tar files, of Parquet, and of tensorflow-datasets."""

import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from transfusion_jax.preparation.readers.raw import (
    PICTURES,
    Columns,
    Picture,
    Raw,
    Rejected,
    captions_of,
    digest_of,
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
        self._path, self._size = path, path.stat().st_size
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self._damaged: list[int] = []
        latest: dict[str, dict[str, tuple[int, int]]] = {}
        for member in self._members():
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            key, ending = f"{folder}/{stem}" if folder else stem, f".{ending.lower()}"
            if ending in latest.get(key, (ending,)):  # a new name, or one that is used again
                latest[key] = {}
                self._samples.append((key, latest[key]))
            latest[key][ending] = (member.offset_data, member.size)
        if not self._samples:
            raise ValueError(
                f"{path} is no tar file that can be read (a compressed one has to be unpacked)"
            )

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Files of the tar; where a header is damaged, the next that can be made out."""
        with self._path.open("rb") as file:
            at = 0
            for member, begin, end in _tar_members(file, self._size):
                if begin > at:
                    file.seek(at)
                    header = file.read(tarfile.BLOCKSIZE)
                    # Zeros are an end mark, and "g" is a header for all members.
                    if header.strip(b"\0") and header[156:157] != tarfile.XGLTYPE:
                        self._damaged.append(at)
                if member is not None and member.isfile():
                    yield member
                at = end

    def __len__(self) -> int:
        return len(self._samples) + len(self._damaged)

    def digest(self) -> str:
        return digest_of(self._samples, self._damaged, self._size)

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
        return Raw(
            name, (Picture(functools.partial(self._member, members[picture], name)),), captions
        )

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

    def digest(self) -> str:
        return digest_of(
            self._path.stat().st_size, str(self._file.schema_arrow), self._file.metadata.to_dict()
        )

    def __getitem__(self, index: int) -> Raw:
        name = f"{self._path.name}:{index}"
        if not self._pairs:
            return Raw(name, (string_of(self._value(self._columns.text, index, name), name),))
        captions = captions_of({"caption": self._value(self._columns.caption, index, name)}, name)
        return Raw(name, (Picture(functools.partial(self._image, index, name)),), captions)

    def _image(self, index: int, name: str) -> bytes:
        value = self._value(self._columns.image, index, name)
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise Rejected("no image", name)
        return value

    def _value(self, column: str, index: int, name: str) -> Any:
        import pyarrow

        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            return _column(self._file, group, column)[int(index - self._starts[group])].as_py()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise Rejected("unreadable row group", name) from error


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
        _, dataset, *split = name.split(":", 2)  # a split may be train[:100]
        try:
            self._source = tfds.data_source(
                dataset, split=split[0] if split else "train", download=False
            )
        except Exception as error:  # every kind of absence raises something else
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"cannot open {name}, which must be prepared as array_record: {said}"
            ) from error
        features = self._source.dataset_info.features
        self._name, self._columns, self._pairs = dataset, columns, columns.image in features
        if (wanted := columns.caption if self._pairs else columns.text) not in features:
            asked = wanted if self._pairs else f"{columns.image} or {columns.text}"
            raise ValueError(f"{name} has no feature {asked}, only {', '.join(features)}")
        self._labels = getattr(features[wanted], "names", None)

    def __len__(self) -> int:
        return len(self._source)

    def digest(self) -> str:
        return digest_of(self._source.dataset_info.full_name, len(self))

    def __getitem__(self, index: int) -> Raw:
        name = f"{self._name}:{index}"
        try:
            example = self._source[index]
        except Exception as error:  # what decodes it raises whatever it likes
            raise Rejected("unreadable example", name) from error
        if not self._pairs:
            return Raw(name, (string_of(example[self._columns.text], name),))
        value = example[self._columns.caption]
        if self._labels:
            value = (
                self._labels[value] if value >= 0 else None
            )  # of examples without a label it is -1
        value = value.tolist() if isinstance(value, np.ndarray) else value
        captions = captions_of({"caption": value}, name)
        return Raw(name, (Picture(lambda: _png(example[self._columns.image])),), captions)


def _png(pixels: Any) -> bytes:
    """A decoded picture as a file again, so that every picture takes the same way."""
    if isinstance(pixels, bytes):
        return pixels
    pixels, file = np.asarray(pixels), io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        file, "png", compress_level=0
    )
    return file.getvalue()


def _tar_members(file: BinaryIO, size: int) -> Iterator[tuple[tarfile.TarInfo | None, int, int]]:
    """Members of a tar, each with its begin and end; what is no header is skipped. The last is None, at the end."""
    at = 0
    while at < size:
        file.seek(at)
        tar = None
        try:
            tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
            while (member := tar.next()) is not None:
                tar.members.clear()  # which only grow
                yield member, member.offset, tar.offset
            break
        except (tarfile.TarError, ValueError, OverflowError):
            at = max(tar.offset if tar else 0, at) + tarfile.BLOCKSIZE
    yield None, size, size


_reading = threading.Lock()


@functools.lru_cache(maxsize=8)
def _read_column(file: Any, group: int, name: str) -> Any:
    return file.read_row_group(group, columns=[name]).column(0)


def _column(file: Any, group: int, name: str) -> Any:
    """One column of one row group of a Parquet file, read once though threads ask for its rows."""
    with _reading:
        return _read_column(file, group, name)
