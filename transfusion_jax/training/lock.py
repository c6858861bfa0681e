"""The lock of a run directory: one run at a time."""

import contextlib
import fcntl
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


class InUse(ValueError):
    """Another process holds a lock; the message says which."""

    def __init__(self, message: str, elsewhere: bool) -> None:
        """
        Args:
          elsewhere: on another machine, or before this one booted. Perhaps it is gone, and the
            server of a network file system has not noticed.
        """
        super().__init__(message)
        self.elsewhere = elsewhere


class Lock:
    """Held until it is released, or this is forgotten, or the process ends in whatever way.

    On a file system without locks, nothing is locked.

    Raises:
      InUse: another process holds it.
    """

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptor = descriptor
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = _in_use(file, descriptor)
            self.release()
            raise found from error
        except OSError:
            pass  # no locks here
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
        with contextlib.suppress(OSError):  # a full disk: it is held without a name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder}\n{_machine()}\n".encode(), 0)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Held until the block ends, whoever releases it before."""
        copy = os.dup(self._descriptor)
        try:
            yield
        finally:
            os.close(copy)


def _in_use(file: Path, descriptor: int) -> InUse:
    said = os.pread(descriptor, 1000, 0).decode(errors="replace").splitlines()
    holder, machine = [*said, "", ""][:2]
    elsewhere = bool(machine) and machine != _machine()
    return InUse(f"{file.parent} is in use by {holder or 'another process'}", elsewhere)


def _machine() -> str:
    """Of this boot of this machine. Its name will not do: a pod that is started on another machine
    keeps its own."""
    with contextlib.suppress(OSError):
        return BOOT.read_text().strip()
    return socket.gethostname()
