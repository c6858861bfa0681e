"""A file of JSON lines, on a disk that may be full for a while."""

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """Appends objects to a file of JSON lines, made when there is one; a line that could not be
    written whole is undone."""

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None
        self._end = 0

    def append(self, value: Any) -> None:
        """Raises OSError if it cannot be written."""
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            self._end = os.lseek(self._file, 0, os.SEEK_END)
        line = (json.dumps(value) + "\n").encode()
        written = 0
        while written < len(line):
            try:
                written += os.pwrite(self._file, line[written:], self._end + written)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
        self._end += len(line)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
