"""Splits: which documents are for training and which are held out, from their content alone.

Names, order and number of the documents do not matter, so no shard has to know of another. A hash
of its pixels puts every picture on one side, and a document is where all its pictures are. Where
they disagree, as those of an edit may, it straddles the split and is in neither part: either choice
would put a picture on both sides. So no picture of a held-out document is in a training document.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from transfusion_jax.data.sources.records import HELD_OUT, STRADDLING, TRAIN

MOST_APART = 8  # rows from one that tells a picture from others to the next


def split_of(spans: Sequence[str | np.ndarray], share: float) -> int:
    """The split of a document of text and pictures, uint8 [h, w, c]; `share` is held out."""
    pictures = [span for span in spans if isinstance(span, np.ndarray)]
    if not pictures:
        return _side([span.encode() for span in spans], share)
    sides = {_side([_telling(x)], share) for x in pictures}
    return sides.pop() if len(sides) == 1 else STRADDLING


def _telling(picture_hwc: np.ndarray) -> np.ndarray:
    """Rows of a picture that tell it from others: at least eight, or all that it has."""
    step = min(max(len(picture_hwc) // 8, 1), MOST_APART)
    return np.ascontiguousarray(picture_hwc[::step])


def _side(content: Sequence[bytes | np.ndarray], share: float) -> int:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return HELD_OUT if int.from_bytes(digest.digest()[:8]) < share * 2**64 else TRAIN
