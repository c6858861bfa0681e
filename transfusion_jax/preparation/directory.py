"""The directory of a data set while it is made: whose it is, and what of it is done."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transfusion_jax.errors import require
from transfusion_jax.files import write_atomic
from transfusion_jax.preparation.finish import as_json

LOCK = ".lock"


def check_out(out: Path, inputs: tuple[str, ...]) -> None:
    """Raises ValueError for a directory that is not one of ours, or that is inside an input."""
    try:
        str(out).encode()
    except UnicodeEncodeError as error:  # ArrayRecord cannot write there
        raise ValueError(
            f"{ascii(str(out))} is not UTF-8, as the path of a data set must be"
        ) from error
    require(not out.exists() or out.is_dir(), f"{out} is a file, not a directory")
    for path in inputs:
        place = os.path.realpath(path)
        inside = os.path.isdir(place) and os.path.realpath(out).startswith(os.path.join(place, ""))
        require(not inside, f"{out} is inside the input {path}, and would be read as a part of it")
    ours = (out / "identity.json").exists() or (out / "dataset.json").exists()
    if out.exists() and not ours:
        foreign = sorted(
            p.name for p in out.iterdir() if p.name != LOCK and not p.name.endswith(".partial")
        )
        require(
            not foreign,
            f"{out} is left as it is: it holds {''.join(foreign[:1])} and no prepared data",
        )


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """While no other part decides anything about `out`; a part that is killed lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def finished(out: Path) -> dict[str, Any] | None:
    """The content of dataset.json, which is written last; None if it is not there."""
    file = out / "dataset.json"
    return json.loads(file.read_text()) if file.exists() else None


def claimed_by(out: Path) -> dict[str, Any] | None:
    """The identity of the preparation that `out` belongs to; None if to none."""
    if (dataset := finished(out)) is not None:
        return dataset["identity"]
    file = out / "identity.json"
    return json.loads(file.read_text()) if file.exists() else None


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Makes `out` the place of this preparation."""
    write_atomic(out / "identity.json", as_json(identity))
    for folder in ("shards", "parts"):
        (out / folder).mkdir(exist_ok=True)


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError if `out` belongs to another preparation, or its inputs have changed."""
    stored = claimed_by(out)
    if stored is None:
        return
    if changed := [f"{name}: {old} -> {new}" for name, old, new in _changes(stored, identity)]:
        raise ValueError(
            f"{out} holds other data, which is left as it is; what differs: "
            f"{'; '.join(changed[:5])}"
        )


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def remove_partials(out: Path, shards: set[int]) -> None:
    """Removes what killed processes left of these shards, which nobody else makes."""
    for folder in ("shards", "parts"):
        for entry in os.scandir(out / folder):
            number = re.match(r"(\d+)\..*\.partial$", entry.name)
            if number and int(number[1]) in shards:
                Path(entry).unlink(missing_ok=True)


def done_shards(out: Path) -> set[int]:
    """Numbers of the shards that have their ledger, and so are done."""
    names = (re.fullmatch(r"(\d+)\.msgpack", entry.name) for entry in os.scandir(out / "parts"))
    return {int(name[1]) for name in names if name}


def clean(out: Path) -> None:
    """Removes what a finished data set no longer needs, and what killed processes left."""
    shutil.rmtree(out / "parts", ignore_errors=True)
    for left in (out / "identity.json", *out.glob("*.partial"), *out.glob("shards/*.partial")):
        left.unlink(missing_ok=True)
