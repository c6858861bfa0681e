"""Readers: what people have on disk, as random access to raw documents.

| input | what it holds |
|---|---|
| folder | pictures with `captions.jsonl`, or with a `.txt` beside each; else every file below it that is read |
| `.jsonl` | a document a line (see `JsonLines`) |
| `.tar` | WebDataset samples: a picture with a `.txt` or `.json` of the same stem |
| `.parquet` | a caption and an image column, or a text column |
| `.txt` | a text document |
| `tfds:NAME[:SPLIT]` | a data set of tensorflow-datasets, prepared in the array_record format |

An item that cannot be read raises `Rejected` when it is asked for, so it is counted and the rest goes on.
"""

from pathlib import Path

from transfusion_jax.preparation.readers.archives import Parquet, TensorflowDatasets, WebDataset
from transfusion_jax.preparation.readers.files import Captions, JsonLines, SideBySide, TextFiles
from transfusion_jax.preparation.readers.raw import PICTURES, Columns, Reader


def open_input(path: str, columns: Columns) -> list[tuple[str, Reader]]:
    """The readers of one input, each with its name; a folder may hold several.

    Raises:
      ValueError: there is no such input, nothing in it can be read, or it has no pair.
    """
    if path.startswith("tfds:"):
        return [(path, TensorflowDatasets(path, columns))]
    place = Path(path)
    if place.is_file():
        return [(path, _open_file(place, columns))]
    if not place.is_dir():
        raise ValueError(f"there is no input {path}")
    if (place / "captions.jsonl").is_file():
        return [(path, Captions(place / "captions.jsonl"))]
    files = sorted(file for file in place.rglob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    readers: list[tuple[str, Reader]] = []
    if pictures:
        if not any(file.with_suffix(".txt").is_file() for file in pictures):
            raise ValueError(
                f"no pair found in {path}: {len(pictures)} pictures, no captions.jsonl and no .txt beside one"
            )
        readers.append((path, SideBySide(place, pictures)))
    beside = {file.with_suffix(".txt") for file in pictures}
    if texts := [file for file in files if file.suffix == ".txt" and file not in beside]:
        readers.append((f"{path} (text)" if pictures else path, TextFiles(texts, place)))
    others = [file for file in files if file.suffix in (".jsonl", ".tar", ".parquet")]
    readers += [(str(file), _open_file(file, columns)) for file in others]
    if not readers:
        raise ValueError(f"no pair found in {path}, nor any other file that can be read")
    return readers


def _open_file(path: Path, columns: Columns) -> Reader:
    if path.name == "captions.jsonl":
        return Captions(path)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix == ".tar":
        return WebDataset(path)
    if path.suffix == ".parquet":
        return Parquet(path, columns)
    if path.suffix == ".txt":
        return TextFiles([path], path.parent)
    raise ValueError(f"{path} is none of .jsonl, .tar, .parquet, .txt, and no folder")
