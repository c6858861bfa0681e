"""What an error says of a checkpoint: that it is damaged, or only that it cannot be read now."""

import errno
import os
from collections.abc import Callable
from typing import Any

FULL = os.strerror(errno.ENOSPC)


def failure(function: Callable[[], Any]) -> Exception | None:
    """The error that a call raises."""
    try:
        function()
    except Exception as error:  # every kind of damage raises something else
        return error
    return None


def may_pass(error: Exception) -> bool:
    """Whether an error is one of reading, which says nothing of what is stored."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return True
    return any(sign in str(error) for sign in TRANSIENT)


def is_missing(error: Exception) -> bool:
    """Whether a file is not there; on a network file system, another host may see it."""
    return isinstance(error, FileNotFoundError) or "NOT_FOUND" in str(error)


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
            errno.EIO,
            errno.EMFILE,
            errno.ENOMEM,
            errno.ENOTCONN,
            errno.ESHUTDOWN,
            errno.ESTALE,
            errno.ETIMEDOUT,
        ),
    ),
)
"""Parts of the messages of errors of reading, as TensorStore gives them."""


def as_line(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if FULL in text:
        return FULL
    return text if len(text) < 200 else text[:200] + "..."
