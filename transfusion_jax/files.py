"""Atomic writes: a temporary file, fsync, rename."""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = f".{secrets.token_hex(4)}.partial"
"""Suffix of this process's temporary files. Random, because processes on other machines may share
its number."""


def local_path(text: str) -> Path:
    """A path of this machine's file systems.

    Raises:
      ValueError: it is a URL, which `Path` would take for a local directory.
    """
    if re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{text} is not a local path: runs and data are read and written on file systems that "
            "all hosts share; mount a bucket, for example with gcsfuse"
        )
    return Path(text)


def appears(path: Path, patience: float) -> bool:
    """Whether a file or directory that another host made is seen here, in so many seconds.

    NFS remembers what was missing, for up to a minute, unless the directory around it is read anew.
    """
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        for parent in reversed(path.parents):
            with contextlib.suppress(OSError), os.scandir(parent) as entries:
                next(entries, None)
        time.sleep(0.2)
    return True


def temporary_of(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on success it is synced to disk and renamed to `path`,
    or to what `path` leads to if it is a link, else removed."""
    if path.is_symlink():
        path = path.resolve()
    temporary = temporary_of(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory to fill; on success it is synced to disk and renamed to `path`,
    else removed.

    Where `path` is a link, this is what it leads to.

    Raises:
      ValueError: `path` is a file, a directory that is not empty, or the working directory, or
        none can be made there.
    """
    check_empty(path)
    path = path.resolve()
    if path == Path.cwd():
        raise ValueError(f"{path} is the working directory, which cannot be replaced")
    temporary = temporary_of(path)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        for place in (*temporary.rglob("*"), temporary):
            _sync(place)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # not every file system can
            raise
    finally:
        os.close(opened)


def check_empty(path: Path) -> None:
    """Raises ValueError unless a directory can be made at `path`, or an empty one is there."""
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{path}: {place} is a file, not a directory")
            if place == path and (found := sorted(x.name for x in path.iterdir())):
                raise ValueError(f"{path} is not empty: it holds {found[0]}")
            return


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomic(path, (json_text(value) + "\n").encode())


def json_text(value: Any) -> str:
    """Indented JSON, in which a number that is not finite is null: JSON has no other word."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
