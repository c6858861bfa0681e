"""Files that are there whole or not at all, whoever else writes them and whenever the process ends."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL = f".{secrets.token_hex(4)}.partial"  # of this process; processes on other machines may have its number


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file, which is on the disk before it gets its name; what was not finished is removed."""
    partial = partial_of(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    with whole(path) as partial:
        partial.write_bytes(content)
