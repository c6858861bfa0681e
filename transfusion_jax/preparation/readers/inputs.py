"""Inputs: what people have on disk, found once, and read at random by any process.

| input | what it holds |
|---|---|
| folder | all files below it of the kinds that follow, and pictures with a `.txt` beside each |
| `captions.jsonl` | captions of pictures, several lines to a picture |
| `.jsonl` | a document a line (see `documents.py`) |
| `.tar` | WebDataset samples: a picture with a `.txt` or `.json` of the same stem |
| `.parquet` | an image and a caption or text column, or a text column |
| `.txt` | a text document |
| `tfds:NAME[:SPLIT]` | a data set of tensorflow-datasets, prepared in the array_record format |

An item that cannot be read raises `Rejected` when it is asked for, so it is counted, and the others
are read.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion_jax.files import local_path
from transfusion_jax.preparation.readers.collection import Arrays, Collection, Each, FileReader
from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.lines import (
    Captions,
    JsonLines,
    Missing,
    file_key,
    named_pictures,
)
from transfusion_jax.preparation.readers.listing import Listing, list_files
from transfusion_jax.preparation.readers.pictures import SideBySide, caption_file
from transfusion_jax.preparation.readers.raw import (
    Columns,
    Reader,
    Rejected,
    digest_of,
    is_picture,
)
from transfusion_jax.preparation.readers.tables import Parquet, TensorflowDatasets
from transfusion_jax.preparation.readers.tars import WebDataset
from transfusion_jax.preparation.readers.texts import TextFiles

CAPTIONS = "captions.jsonl"
FILES: dict[str, type[FileReader]] = {
    ".jsonl": JsonLines,
    ".tar": WebDataset,
    ".parquet": Parquet,
}
"""Readers of one file, by its ending."""


@dataclass(frozen=True)
class Input:
    """One input, or the part of a folder that one reader reads, as it was found."""

    name: str
    """In the ledger."""
    kind: str
    """An ending in `FILES`, "captions", "pictures", "texts" or "tfds"."""
    folder: Folder
    columns: Columns
    arrays: Arrays
    """The index that the reader is opened with."""
    items: int
    digest: str
    file: str = ""
    """The `captions.jsonl`, or the name of a TFDS data set."""
    missing: Missing = Missing(0, ())
    unread: tuple[tuple[str, int], ...] = ()
    """Endings of files in the folder that no reader reads, and how many there are of each."""

    def open(self) -> Reader:
        """The reader of the items."""
        if self.kind == "tfds":
            return TensorflowDatasets(self.file, self.columns, self.folder.max_bytes)
        if self.kind == "captions":
            return Captions(self.folder, self.file, self.columns, self.arrays)
        if self.kind == "pictures":
            return SideBySide(self.folder, self.columns, self.arrays)
        if self.kind == "texts":
            return TextFiles(self.folder, self.columns, self.arrays)
        return Collection(FILES[self.kind], self.folder, self.columns, self.arrays)


def find_inputs(path: str, columns: Columns, max_bytes: int, each: Each = map) -> list[Input]:
    """What is in one input; a folder may hold several kinds of files.

    Args:
      max_bytes: of an item; a larger one is rejected unread.
      each: maps a function over files, which may take long.

    Raises:
      ValueError: there is no such input, it cannot be read, or there is nothing in it to read.
    """
    if path.startswith("tfds:"):
        folder = Folder(Path(), max_bytes)
        reader = TensorflowDatasets(path, columns, max_bytes)
        return [Input(path, "tfds", folder, columns, {}, len(reader), reader.digest(), path)]
    place = local_path(path)
    if place.is_file():
        folder = Folder(place.parent, max_bytes, place.name)
        return [_file(path, folder, columns, each)]
    if not place.is_dir():
        raise ValueError(f"there is no input {path}")
    return _in_folder(path, Folder(place, max_bytes), columns, each)


def stamp_of(path: str) -> str:
    """A digest of the names, sizes and times of an input's files; the same if none has changed."""
    if path.startswith("tfds:"):
        return path
    place = local_path(path)
    if place.is_file():
        info = place.stat()
        return digest_of(info.st_size, info.st_mtime_ns)
    return list_files(place).stamp()


def _file(path: str, folder: Folder, columns: Columns, each: Each) -> Input:
    name = folder.chosen
    if name == CAPTIONS:
        return _captions(path, folder, name, columns)
    ending = Path(name).suffix
    if ending == ".txt":
        return _texts(path, folder, [name], [(folder.root / name).stat().st_size], columns)
    if ending not in FILES:
        raise ValueError(f"{path} is none of .jsonl, .tar, .parquet, .txt, and no folder")
    return _files(path, folder, ending, [name], columns, each)


def _in_folder(path: str, folder: Folder, columns: Columns, each: Each) -> list[Input]:
    """The inputs in a folder. A picture that no caption names is an item, and so is counted."""
    listing = list_files(folder.root)
    captions = [name for name in listing.names if Path(name).name == CAPTIONS]
    inputs = [
        _captions(path if name == CAPTIONS else f"{path}/{name}", folder, name, columns)
        for name in captions
    ]
    files = []
    for ending in FILES:
        names = [n for n in listing.names if n.endswith(ending) and n not in captions]
        if names:
            one = f"{path}/{names[0]}" if len(names) == 1 else f"{path} ({ending})"
            files.append(_files(one, folder, ending, names, columns, each))
    pictures = _uncaptioned(listing, [*inputs, *files], folder)
    captioning = {caption_file(name) for name in listing.names if is_picture(name)}
    captioning.intersection_update(listing.names)
    beside = captioning.intersection(caption_file(listing.names[i]) for i in pictures.tolist())
    spare = len(captioning - beside)  # of pictures that a line names
    texts = [i for i, n in enumerate(listing.names) if n.endswith(".txt") and n not in captioning]
    if len(pictures):
        if not (inputs or files or beside or texts):
            raise ValueError(
                f"no pair found in {path}: {len(pictures)} pictures, no {CAPTIONS} and no .txt "
                "beside one"
            )
        name = f"{path} (pictures)" if inputs else path
        inputs.append(_pictures(name, folder, listing, pictures, beside, columns))
    if texts:
        names = [listing.names[i] for i in texts]
        name = f"{path} (text)" if inputs else path
        inputs.append(_texts(name, folder, names, listing.sizes[texts].tolist(), columns))
    if not inputs and not files:
        raise ValueError(f"no pair found in {path}, nor any other file that can be read")
    first, *others = [*inputs, *files]
    return [dataclasses.replace(first, unread=_unread(listing, spare)), *others]


def _unread(listing: Listing, spare: int) -> tuple[tuple[str, int], ...]:
    others = Counter(
        Path(name).suffix or "(no ending)"
        for name in listing.names
        if not is_picture(name) and not name.endswith((".txt", *FILES))
    )
    if spare:
        others[".txt beside pictures that have captions"] = spare
    return tuple(others.most_common())


def _uncaptioned(listing: Listing, inputs: Sequence[Input], folder: Folder) -> np.ndarray:
    """Numbers of the pictures in a folder that no line of its `.jsonl` files names."""
    pictures = np.asarray([i for i, name in enumerate(listing.names) if is_picture(name)], int)
    if not len(pictures):
        return pictures
    named = [np.zeros(0, np.uint64)]
    for found in inputs:
        if found.kind == "captions":
            lines = JsonLines(folder, found.file, found.columns, found.arrays)
            named.append(named_pictures(lines, folder.root))
        elif found.kind == ".jsonl":
            reader = found.open()
            for file in range(len(found.arrays["items"]) - 1):
                named.append(named_pictures(reader.reader(file), folder.root))
    keys = [file_key(listing.names[number], folder.root) for number in pictures.tolist()]
    return pictures[~np.isin(np.asarray(keys, np.uint64), np.concatenate(named))]


def _captions(name: str, folder: Folder, file: str, columns: Columns) -> Input:
    try:
        scanned, missing = Captions.scan(folder, file, columns)
    except Rejected as error:
        raise ValueError(f"cannot read {folder.root / file}: {error.reason}") from error
    return Input(name, "captions", folder, columns, *scanned, file, missing)


def _files(
    name: str, folder: Folder, ending: str, files: Sequence[str], columns: Columns, each: Each
) -> Input:
    arrays, digest = Collection.scan(FILES[ending], folder, files, columns, each)
    return Input(name, ending, folder, columns, arrays, int(arrays["items"][-1]), digest)


def _pictures(
    name: str,
    folder: Folder,
    listing: Listing,
    numbers: np.ndarray,
    captions: set[str],
    columns: Columns,
) -> Input:
    names = [listing.names[number] for number in numbers.tolist()]
    captioned = [caption_file(name) in captions for name in names]
    arrays, items, digest = SideBySide.scan(folder, names, captioned)
    digest = digest_of(digest, listing.sizes[numbers])
    return Input(name, "pictures", folder, columns, arrays, items, digest)


def _texts(
    name: str, folder: Folder, files: Sequence[str], sizes: Sequence[int], columns: Columns
) -> Input:
    return Input(name, "texts", folder, columns, *TextFiles.scan(folder, files, sizes))
