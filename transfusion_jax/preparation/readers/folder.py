"""The folder of an input, and the only way in which files are read from it.

What an input says about files is not trusted: a line may name `../secret`, a link may lead
anywhere, and a name may belong to a device that never ends. Only regular files inside the folder
are opened, and only items of a bounded size are read.
"""

import functools
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transfusion_jax.preparation.readers.raw import Rejected

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Folder:
    """Reads files by their names, which are relative to `root` or absolute."""

    root: Path
    """May itself be a link: the user named it."""
    max_bytes: int
    """Size of the largest item that is read."""
    chosen: str = ""
    """Name of the file that the user named as the input, which may be a link to anywhere."""

    def path(self, name: str, item: str) -> str:
        """The real path of a regular file in the folder.

        Raises:
          Rejected: it is missing, unreadable, outside the folder, or no regular file.
        """
        try:
            path = self._locate(name)
            if path is None:
                raise Rejected("outside the input", item)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise Rejected("not a regular file", item)
            return path
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise Rejected("missing file", item) from error  # ValueError: a name with a null byte
        except OSError as error:
            raise Rejected("unreadable file", item) from error

    def open(self, name: str, item: str) -> BinaryIO:
        """Opens a file for reading; raises Rejected as `path` does."""
        path = self.path(name, item)
        try:
            return os.fdopen(os.open(path, FLAGS), "rb")
        except OSError as error:
            raise Rejected("unreadable file", item) from error

    def read(self, name: str, item: str) -> bytes:
        """The content of a file; raises Rejected as `open` does, and for one that is too large."""
        with self.open(name, item) as file:
            return read_at(file, 0, os.fstat(file.fileno()).st_size, self.max_bytes, item)

    def read_part(self, name: str, begin: int, end: int, item: str) -> bytes:
        """The bytes [begin, end) of a file; raises Rejected as `read` does."""
        with self.open(name, item) as file:
            return read_at(file, begin, end - begin, self.max_bytes, item)

    def _locate(self, name: str) -> str | None:
        """The real path of a file; None if it is outside the folder."""
        if name.endswith(os.sep):
            raise NotADirectoryError(name)
        path = os.path.realpath(os.path.join(self.root, name))
        if self.chosen and name == self.chosen:
            return path
        return path if os.path.join(path, "").startswith(self._real_root) else None

    @functools.cached_property
    def _real_root(self) -> str:
        """With a separator at its end."""
        return os.path.join(os.path.realpath(self.root), "")


def read_at(file: BinaryIO, begin: int, size: int, max_bytes: int, item: str) -> bytes:
    """Reads so many bytes of a file.

    Raises:
      Rejected: they are more than `max_bytes`, or the file ends before them.
    """
    if size > max_bytes:
        raise Rejected("too large", item)
    try:
        file.seek(begin)
        content = file.read(size)
    except OSError as error:
        raise Rejected("unreadable file", item) from error
    if len(content) < size:
        raise Rejected("truncated file", item)
    return content
