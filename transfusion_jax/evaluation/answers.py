"""Answers of an engine, read strictly: one picture or one text, and nothing beside it."""

from collections.abc import Sequence

import numpy as np

Spans = Sequence[str | np.ndarray]
"""What the engine adds to a request."""


def only_picture(spans: Spans) -> np.ndarray | None:
    """The picture [H, W, C] of an answer that is one picture, else None.

    What holds values that are not finite is no picture.
    """
    if len(spans) != 1 or not isinstance(spans[0], np.ndarray):
        return None
    return spans[0] if np.isfinite(spans[0]).all() else None


def only_text(spans: Spans) -> str:
    """The text of an answer that is one text, without the space between it and the text that it
    continues; else an empty one."""
    text = spans[0] if len(spans) == 1 and isinstance(spans[0], str) else ""
    return text.removeprefix(" ")
