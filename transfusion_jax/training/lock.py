"""The lock of a run directory: one run at a time."""

import contextlib
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path


class Lock:
    """Held until it is released, or this is forgotten, or the process ends in whatever way.

    On a file system without locks, nothing is locked.

    Raises:
      ValueError: another process holds it; the message says which.
    """

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            with contextlib.suppress(OSError):  # no locks here
                _lock(descriptor)
        except ValueError as error:
            self.release()
            raise ValueError(f"{file.parent} is in use by {error}") from error
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
        with contextlib.suppress(OSError):  # a full disk: it is held without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)


def _lock(descriptor: int) -> None:
    """Raises ValueError, which names the holder, if there is one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        raise ValueError(holder or "another process") from error
