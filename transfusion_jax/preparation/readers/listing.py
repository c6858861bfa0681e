"""The files below a folder."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfusion_jax.preparation.readers.names import Names
from transfusion_jax.preparation.readers.raw import digest_of


@dataclass(frozen=True)
class Listing:
    """Names relative to the folder, in order; links, pipes and devices are among them."""

    names: list[str]
    sizes: np.ndarray
    """int64; 0 where there is nothing to be found, as behind a broken link."""
    times: np.ndarray
    """int64, of the last change, in nanoseconds."""

    def stamp(self) -> str:
        """A digest; the same if no file has changed."""
        return digest_of(Names.of(self.names).content, self.sizes, self.times)


def list_files(root: Path) -> Listing:
    """Everything below a folder but folders.

    Raises:
      ValueError: a folder cannot be read, or it holds a link to a folder, which is not followed.
    """
    found = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            raise ValueError(
                f"cannot read {os.path.join(root, folder)}: {error.strerror}"
            ) from error
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif _leads_to_folder(entry):
                raise ValueError(
                    f"{root} holds a link to a folder, {name}, which is not followed: remove it, "
                    "and name that folder as an input of its own"
                )
            else:
                found.append((name, *_size_and_time(entry)))
    found.sort()
    names = [name for name, _, _ in found]
    sizes = np.asarray([size for _, size, _ in found], np.int64)
    return Listing(names, sizes, np.asarray([time for _, _, time in found], np.int64))


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    try:
        info = entry.stat()
    except OSError:
        return 0, 0
    return info.st_size, info.st_mtime_ns
