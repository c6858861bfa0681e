"""Readers of tables: Parquet files, and data sets of tensorflow-datasets."""

import functools
import io
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from transfusion_jax.preparation.readers.collection import Scanned
from transfusion_jax.preparation.readers.documents import (
    TEXT_KEYS,
    captions_of,
    holds_another_picture,
    names_picture,
)
from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.raw import (
    Columns,
    Picture,
    Raw,
    Rejected,
    digest_of,
    string_of,
)

LOOKED_AT = 64  # rows of a file whose other columns are looked at for names of pictures


class Parquet:
    """A Parquet file with an image and a caption or text column, or with a text column alone.

    Images are bytes, or structs with `bytes`, as Hugging Face writes them; captions are strings or
    lists of strings.
    """

    def __init__(
        self, folder: Folder, file: str, columns: Columns, arrays: dict[str, np.ndarray]
    ) -> None:
        self._name = file
        self._columns = columns
        self._max_bytes = folder.max_bytes
        self._file = _open_parquet(folder, file)
        names = self._file.schema_arrow.names
        self._pairs = columns.image in names
        self._words = _words(names, columns)
        self._starts = arrays["starts"]

    @staticmethod
    def scan(folder: Folder, file: str, columns: Columns) -> Scanned:
        """The index holds the rows at which row groups begin; the digest is that of the metadata.

        Raises:
          ValueError: it cannot be read, or its columns are not those that are wanted.
          Rejected: the file cannot be opened.
        """
        opened = _open_parquet(folder, file)
        schema = opened.schema_arrow
        pictures = [
            field.name
            for field in schema
            if _holds_bytes(field.type)
            or (columns.image not in schema.names and names_picture(field.name))
        ]
        pictures += _named_in_cells(opened, columns)
        _check_columns(f"{folder.root / file}", "column", schema.names, pictures, columns)
        metadata = opened.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        starts = np.cumsum([0, *rows], dtype=np.int64)
        return Scanned({"starts": starts}, int(starts[-1]), _footer_digest(folder, file, metadata))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Raw:
        name = f"{self._name}:{index}"
        words = self._value(self._words, index, name)
        if not self._pairs:
            return Raw(name, (string_of(words, name),))
        captions = captions_of({"caption": words}, name)
        return Raw(name, (Picture(functools.partial(self._image, index, name)),), captions)

    def _image(self, index: int, name: str) -> bytes:
        value = self._value(self._columns.image, index, name)
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise Rejected("no image", name)
        if len(value) > self._max_bytes:
            raise Rejected("too large", name)
        return value

    def _value(self, column: str, index: int, name: str) -> Any:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        try:
            value = _column(self._file, group, column)[int(index - self._starts[group])].as_py()
        except Exception as error:  # decoders raise whatever they like
            raise Rejected("unreadable row group", name) from error
        if isinstance(value, str | bytes) and len(value) > self._max_bytes:
            raise Rejected("too large", name)
        return value


class TensorflowDatasets:
    """A data set of tensorflow-datasets through `tfds.data_source`, which needs no TensorFlow.

    Raises:
      ValueError: the package or the data set is missing, or its features are not those wanted.
    """

    def __init__(self, name: str, columns: Columns, max_bytes: int) -> None:
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
        pictures = [key for key, x in features.items() if isinstance(x, tfds.features.Image)]
        _check_columns(name, "feature", list(features), pictures, columns)
        self._name = dataset
        self._columns = columns
        self._max_bytes = max_bytes
        self._pairs = columns.image in features
        self._words = _words(list(features), columns)
        self._labels = getattr(features[self._words], "names", None)

    def __len__(self) -> int:
        return len(self._source)

    def digest(self) -> str:
        """Of its full name and its number of examples."""
        return digest_of(self._source.dataset_info.full_name, len(self))

    def __getitem__(self, index: int) -> Raw:
        name = f"{self._name}:{index}"
        try:
            example = self._source[index]
        except Exception as error:  # decoders raise whatever they like
            raise Rejected("unreadable example", name) from error
        if not self._pairs:
            text = example[self._words]
            if isinstance(text, str | bytes) and len(text) > self._max_bytes:
                raise Rejected("too large", name)
            return Raw(name, (string_of(text, name),))
        value = example[self._words]
        if self._labels:
            value = self._labels[value] if value >= 0 else None  # -1: without a label
        value = value.tolist() if isinstance(value, np.ndarray) else value
        captions = captions_of({"caption": value}, name)
        image = example[self._columns.image]
        return Raw(
            name, (Picture(functools.partial(_png, image, self._max_bytes, name)),), captions
        )


def _words(names: list[str], columns: Columns) -> str:
    """The column of captions, or of text; where there are images, text may be their captions."""
    if columns.image in names and columns.caption in names:
        return columns.caption
    return columns.text


def _check_columns(
    name: str, kind: str, names: list[str], pictures: Iterable[str], columns: Columns
) -> None:
    """Checks what there is against what is read.

    Raises:
      ValueError: a column is missing; or there are others with pictures, or with text beside
        captions, that are not in `columns.ignored`.
    """
    pairs = columns.image in names
    words = _words(names, columns)
    if words not in names:
        asked = f"{columns.caption} or {words}" if pairs else f"{columns.image} or {words}"
        raise ValueError(f"{name} has no {kind} {asked}, only {', '.join(names)}")
    read = {words, columns.image} if pairs else {words}
    wanted = {*pictures, columns.text}
    if pairs and words == columns.text:
        wanted.add("captions")
    left = [x for x in names if x in wanted - read - {*columns.ignored}]
    if left:
        raise ValueError(
            f"{name} has {kind}s that would be left out: {', '.join(left)}; read one instead with "
            "--columns.image, --columns.caption or --columns.text, or name them in "
            "--columns.ignored"
        )


def _named_in_cells(file: Any, columns: Columns) -> list[str]:
    """The other columns whose first rows hold pictures as text, or name others than their own."""
    schema = file.schema_arrow
    known = {*TEXT_KEYS, columns.image, columns.caption, columns.text, *columns.ignored}
    others = [x.name for x in schema if x.name not in known and not _holds_bytes(x.type)]
    own = f"{columns.image}.path"  # of a struct; there may be none
    try:
        batch = next(file.iter_batches(LOOKED_AT, columns=[*others, own]), None)
    except Exception:  # decoders raise whatever they like; the rows will be counted
        return []
    found = set()
    for row in batch.to_pylist() if batch is not None else ():
        path = (row.get(columns.image) or {}).get("path") or ""
        stem = os.path.basename(path).partition(".")[0]
        found.update(x for x in others if holds_another_picture(row[x], stem, x))
    return [name for name in others if name in found]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this Arrow type may hold encoded pictures: bytes, also inside others."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return types.is_uint8(kind.value_type) or _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _footer_digest(folder: Folder, file: str, metadata: Any) -> str:
    """Of the bytes at the end of a Parquet file that describe all the others.

    `metadata.to_dict()` would end the process for some damaged files.
    """
    with folder.open(file, file) as opened:
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(size - metadata.serialized_size - 8, 0))  # 8: their length, and a mark
        return digest_of(size, opened.read())


def _open_parquet(folder: Folder, file: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(folder.path(file, file))
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read {folder.root / file} as Parquet: {said}") from error


def _png(pixels: Any, max_bytes: int, name: str) -> bytes:
    """A decoded picture as a file again, so that all pictures are treated alike."""
    content = pixels
    if not isinstance(pixels, bytes):
        pixels = np.asarray(pixels)
        file = io.BytesIO()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture.save(file, "png", compress_level=0)
        content = file.getvalue()
    if len(content) > max_bytes:
        raise Rejected("too large", name)
    return content


_reading = threading.Lock()


@functools.lru_cache(maxsize=4)
def _read_column(file: Any, group: int, name: str) -> Any:
    return file.read_row_group(group, columns=[name]).column(0)


def _column(file: Any, group: int, name: str) -> Any:
    """One column of one row group of a Parquet file, read once though threads ask for its rows."""
    with _reading:
        return _read_column(file, group, name)
