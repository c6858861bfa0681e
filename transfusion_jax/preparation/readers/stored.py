"""Inputs on disk: found once, by one process, and memory-mapped by all that make shards."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfusion_jax.files import atomic_path, write_atomic
from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.inputs import Input
from transfusion_jax.preparation.readers.lines import Missing
from transfusion_jax.preparation.readers.raw import Columns


def save_inputs(inputs: Sequence[Input], stamps: dict[str, str], folder: Path) -> None:
    """Writes what was found, `inputs.json` last.

    Args:
      stamps: of the inputs as they were named; who loads them compares these with new ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, found in enumerate(inputs):
        for key, array in found.arrays.items():
            with atomic_path(folder / f"{number}_{key}.npy") as path, path.open("wb") as file:
                np.save(file, array)
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        fields["arrays"] = list(found.arrays)
        fields["columns"] = dataclasses.asdict(found.columns)
        fields["folder"] = {**dataclasses.asdict(found.folder), "root": str(found.folder.root)}
        entries.append(fields)
    content = json.dumps({"stamps": stamps, "inputs": entries}, indent=1)
    write_atomic(folder / "inputs.json", content.encode())


def load_inputs(folder: Path, stamps: dict[str, str] | None = None) -> list[Input] | None:
    """What `save_inputs` wrote; None if nothing was, or with other stamps."""
    file = folder / "inputs.json"
    if not file.is_file():
        return None
    stored = json.loads(file.read_text())
    if stamps is not None and stored["stamps"] != stamps:
        return None
    return [_input(number, fields, folder) for number, fields in enumerate(stored["inputs"])]


def _input(number: int, fields: dict, folder: Path) -> Input:
    arrays = {
        key: np.load(folder / f"{number}_{key}.npy", mmap_mode="r") for key in fields["arrays"]
    }
    root = fields["folder"]
    columns = fields["columns"]
    count, names = fields["missing"]
    return Input(
        **{
            **fields,
            "arrays": arrays,
            "folder": Folder(**{**root, "root": Path(root["root"])}),
            "columns": Columns(**{**columns, "ignored": tuple(columns["ignored"])}),
            "missing": Missing(count, tuple(names)),
            "unread": tuple(map(tuple, fields["unread"])),
        }
    )
