"""What an error says of storage: that a checkpoint is damaged, or only that something cannot be
read or written now."""

import errno
import os
from collections.abc import Callable
from typing import Any

FULL = os.strerror(errno.ENOSPC)
SILENT = (errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT)
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *SILENT)
"""Numbers of errors of a file system that is full, takes no file so large, has turned read-only, or
does not answer."""


def failure(function: Callable[[], Any]) -> Exception | None:
    """The error that a call raises."""
    try:
        function()
    except Exception as error:  # every kind of damage raises something else
        return error
    return None


def kind_of(error: Exception) -> str:
    """What an error of reading says: "damage" of what is stored, or nothing of it.

    "passing": reading failed, and may succeed later. "missing": a file is not there; on a network
    file system, another host may see it.
    """
    if isinstance(error, FileNotFoundError) or "NOT_FOUND" in str(error):
        return "missing"
    passing = isinstance(error, OSError) or any(sign in str(error) for sign in TRANSIENT)
    return "passing" if passing else "damage"


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in str(error)


TRANSIENT = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    *map(
        os.strerror,
        (
            errno.EACCES,
            errno.EMFILE,
            errno.ENOMEM,
            *SILENT,
        ),
    ),
)
"""Parts of the messages of errors of reading, as TensorStore gives them."""


def as_line(error: Exception) -> str:
    """An error as one short line: its beginning, and its end, where a cause often stands."""
    text = " ".join(str(error).split()) or type(error).__name__
    if FULL in text:
        return FULL
    return text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"
