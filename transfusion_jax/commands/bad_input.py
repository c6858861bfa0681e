"""Bad input at the command line: one line, exit code 2."""

import argparse
import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from transfusion_jax.files import local_path


class BadInput(Exception):
    """The user's input cannot work; the message is one line."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Turns a ValueError raised inside, which the user caused, into `BadInput`."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(str(error)) from error
        raise


def check_file(flag: str, path: Path | None) -> None:
    """Raises ValueError for an output file that cannot be written; None is no file, and passes."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a directory, not a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag} {path} is not a regular file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.parent} is not a directory")


def check_directory(flag: str, path: Path) -> None:
    """Raises ValueError for an output directory that a file is in the way of."""
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{flag} {path}: {place} is a file, not a directory")
            return


def local(text: str) -> Path:
    """The path of a flag."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
