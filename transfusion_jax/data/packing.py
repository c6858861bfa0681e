"""Packing: which documents make which row, from their lengths alone; and the row itself.

The plan is best-fit decreasing: documents go, longest first, into the fullest row that still has room
(Ding et al. 2024, arXiv 2404.10830). A document is cut only if it is text longer than a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import ImageConfig
from transfusion_jax.data.documents import Sequenced


@dataclass(frozen=True)
class Plan:
    """Row r holds the pieces row_start[r] ... row_start[r + 1] - 1; a piece is [begin, end) of a document.

    Every document is in some row or in `rejected`.
    """

    row_start: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    rejected: dict[str, np.ndarray]
    """Reason -> documents."""

    def __len__(self) -> int:
        return len(self.row_start) - 1

    def row(self, r: int) -> list[tuple[int, int, int]]:
        """(document, begin, end) of every piece of row r."""
        pieces = slice(self.row_start[r], self.row_start[r + 1])
        return list(zip(*(x[pieces].tolist() for x in (self.document, self.begin, self.end)), strict=True))

    def filled(self, row_length: int) -> float:
        """Share of positions that hold a document."""
        return float((self.end - self.begin).sum() / max(len(self) * row_length, 1))


def plan(lengths: np.ndarray, row_length: int, cut: bool) -> Plan:
    """Packs documents of these lengths. `cut` says whether those longer than a row may be cut (text only)."""
    lengths = np.asarray(lengths, np.int64)
    document, begin = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    rejected = {}
    if cut:
        pieces = np.maximum(-(-lengths // row_length), 1)
        document = np.repeat(document, pieces)
        begin = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * row_length
    for reason, bad in (("empty", lengths < 1), ("longer than a row", ~np.bool_(cut) & (lengths > row_length))):
        if bad.any():
            rejected[reason] = np.flatnonzero(bad)
    keep = ~np.isin(document, np.concatenate([*rejected.values(), []]))
    document, begin = document[keep], begin[keep]
    end = np.minimum(lengths[document], begin + row_length)
    row, rows = _best_fit(end - begin, row_length)
    order = np.argsort(row, kind="stable")
    row_start = np.searchsorted(row[order], np.arange(rows + 1))
    return Plan(row_start, document[order], begin[order], end[order], rejected)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing; returns the row of every piece and the number of rows.

    Pieces of one length are placed together. The fullest row with room r takes r // length of them before the
    next fullest gets one, so a whole group needs one pass over the distinct rooms, not one over the pieces.
    """
    row, rows = np.zeros(len(lengths), np.int64), 0
    room: list[np.ndarray] = [np.zeros(0, np.int64) for _ in range(capacity + 1)]  # room[r]: rows with r left
    order = np.argsort(-lengths, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []
    for group in groups:
        length = int(lengths[group[0]])
        for r in range(length, capacity + 1):
            if len(group) == 0:
                break
            if r == capacity:  # no open row is left: open as many as are needed
                needed = -(-len(group) // (capacity // length))
                room[r] = np.arange(rows, rows + needed)
                rows += needed
            if len(room[r]) == 0:
                continue
            each = r // length
            open_rows = room[r][: -(-len(group) // each)]
            slots = np.repeat(open_rows, each)[: len(group)]
            row[group[: len(slots)]] = slots
            group, room[r] = group[len(slots) :], room[r][len(open_rows) :]
            taken = np.full(len(open_rows), each)
            taken[-1] = len(slots) - each * (len(open_rows) - 1)
            for count in {each, int(taken[-1])}:
                left = r - count * length
                room[left] = np.concatenate([room[left], open_rows[taken == count]])
    return row, rows


def pack(pieces: Sequence[tuple[Sequenced, int, int]], row_length: int, image: ImageConfig) -> Batch:
    """One row, as a `Batch` without its leading dimension, from [begin, end) of each sequenced document."""
    L, M = row_length, max(row_length // image.span, 1)
    tokens, segment, position, target = (np.zeros(L, np.int32) for _ in range(4))
    weight = np.zeros(L, np.float32)
    latents = np.zeros((M, *image.shape), np.float32)
    start, limit = np.full(M, L, np.int32), np.ones(M, np.int32)
    at = slot = 0
    for number, (document, begin, end) in enumerate(pieces, 1):
        # A document may be shorter than planned: a caption may have been dropped.
        end = min(end, len(document.tokens))
        here = slice(at, at + end - begin)
        tokens[here], target[here] = document.tokens[begin:end], document.target[begin:end]
        weight[here] = document.weight[begin:end]
        segment[here], position[here] = number, np.arange(end - begin)
        for first_patch, span in document.images:
            latents[slot], start[slot], limit[slot] = span.latent_hwc, at + first_patch, span.noise_limit
            slot += 1
        at += end - begin
    return Batch(tokens, segment, position, target, weight, latents, start, limit)
