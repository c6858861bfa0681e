"""Packing: which documents make which row, from their lengths alone; and the row itself.

Text alone is cut freely, and fills its rows. Where there are images, every row starts with the longest document
that is left and is filled as well as the others can (best-fit packing: Ding et al. 2024, arXiv 2404.10830); then only
text longer than a row is cut.
"""

import contextlib
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import ImageConfig
from transfusion_jax.data.documents import Sequenced
from transfusion_jax.files import atomic_path


@dataclass(frozen=True)
class Plan:
    """Row r holds the pieces row_start[r] ... row_start[r + 1] - 1; a piece is [begin, end) of a document.

    Every document is in some row or in `rejected`.
    """

    VERSION: ClassVar[int] = 1
    """Of the algorithm; a plan that was kept is used only under the same."""

    row_start: np.ndarray
    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    rejected: dict[str, np.ndarray]
    """Reason -> documents."""

    def __len__(self) -> int:
        return len(self.row_start) - 1

    def save(self, file: Path) -> None:
        """Writes the plan atomically."""
        file.parent.mkdir(exist_ok=True)
        arrays = {name: getattr(self, name) for name in ("row_start", "document", "begin", "end")}
        with atomic_path(file) as partial, partial.open("wb") as out:
            np.savez(
                out, **arrays, **{f"rejected:{reason}": x for reason, x in self.rejected.items()}
            )

    @classmethod
    def load(cls, file: Path) -> "Plan":
        with file.open("rb") as opened, np.load(opened) as arrays:
            parts = {name: arrays[name] for name in arrays.files}
        rejected = {
            name.partition(":")[2]: parts.pop(name)
            for name in list(parts)
            if name.startswith("rejected:")
        }
        return cls(**parts, rejected=rejected)

    def row(self, r: int) -> list[tuple[int, int, int]]:
        """(document, begin, end) of every piece of row r."""
        pieces = slice(self.row_start[r], self.row_start[r + 1])
        return list(
            zip(*(x[pieces].tolist() for x in (self.document, self.begin, self.end)), strict=True)
        )

    def filled(self, row_length: int) -> float:
        """Share of positions that hold a document."""
        return float((self.end - self.begin).sum() / max(len(self) * row_length, 1))


def plan(lengths: np.ndarray, row_length: int, splittable: bool | np.ndarray) -> Plan:
    """Packs documents of these lengths; only those that are `splittable` may be cut at a row's end."""
    lengths = np.asarray(lengths, np.int64)
    splittable = np.broadcast_to(splittable, lengths.shape)
    rejected = {"empty": lengths < 1, "longer than a row": ~splittable & (lengths > row_length)}
    # A fixed shuffle, so that neighbours in the data are not neighbours in a row.
    document = np.random.default_rng(0).permutation(len(lengths))
    document = document[~np.any([*rejected.values()], axis=0)[document]]
    if splittable.all():
        row, document, begin, end = _concatenate(document, lengths, row_length)
    else:
        pieces = -(-lengths[document] // row_length)
        document = np.repeat(document, pieces)
        begin = (
            np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        ) * row_length
        end = np.minimum(lengths[document], begin + row_length)
        row = _by_patterns(end - begin, row_length)
    order = np.argsort(row, kind="stable")
    row_start = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
    reasons = {reason: np.flatnonzero(bad) for reason, bad in rejected.items() if bad.any()}
    return Plan(row_start, document[order], begin[order], end[order], reasons)


def kept_plan(
    lengths: np.ndarray, row_length: int, splittable: bool | np.ndarray, folder: Path | None
) -> Plan:
    """`plan`, cached in `folder` under a digest of its inputs; computed anew if that is impossible."""
    if folder is None:
        return plan(lengths, row_length, splittable)
    inputs = hashlib.sha256(f"{Plan.VERSION} {row_length}".encode())
    inputs.update(np.ascontiguousarray(lengths, "<i8").tobytes())
    inputs.update(np.broadcast_to(splittable, np.shape(lengths)).tobytes())
    file = folder / f"{inputs.hexdigest()[:16]}.npz"
    with contextlib.suppress(
        OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile
    ):  # if damaged
        return Plan.load(file)
    made = plan(lengths, row_length, splittable)
    with contextlib.suppress(OSError):
        made.save(file)
    return made


def _concatenate(
    document: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, ...]:
    """Row, document, begin and end of every piece when documents follow one another and rows cut freely."""
    stop = np.cumsum(lengths[document])
    start, total = stop - lengths[document], int(stop[-1]) if len(stop) else 0
    edges = np.union1d(start, np.arange(0, total, row_length))
    owner = np.searchsorted(start, edges, side="right") - 1
    ends = np.append(edges[1:], total)[: len(edges)]
    return edges // row_length, document[owner], edges - start[owner], ends - start[owner]


def _by_patterns(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of every piece, none longer than a row.

    Lengths repeat, so rows do: a pattern, which says how many pieces of each length a row takes, is used as often
    as the pieces that are left allow. The work grows with the number of patterns, not of pieces.
    """
    row, rows = np.zeros(len(lengths), np.int64), 0
    order = np.argsort(lengths, kind="stable")
    count = np.bincount(lengths, minlength=capacity + 1)
    first = np.cumsum(count) - count  # where the pieces of each length begin in `order`
    count = count.tolist()
    left = sum(1 << length for length, n in enumerate(count) if n)
    while left:
        pattern = _pattern(count, left, capacity)
        times = min(count[length] // n for length, n in pattern.items())
        for length, n in pattern.items():
            row[order[first[length] :][: n * times]] = np.repeat(np.arange(rows, rows + times), n)
            first[length] += n * times
            count[length] -= n * times
            if count[length] == 0:
                left ^= 1 << length
        rows += times
    return row


def _pattern(count: list[int], left: int, capacity: int) -> dict[int, int]:
    """Lengths, and how many of each, that fill one row well; always with the greatest length that is left.

    Bit l of `left` says whether pieces of length l are left. Greedy takes the longest piece that fits, until none
    does. That fills a row unless all lengths are alike, as those of pairs are: thirteen of 300 leave 196 of 4,096.
    Then one piece more is tried, each as near as can be to its equal share of the room.
    """

    def take(share: int) -> bool:
        """Takes the longest piece of at most `share` positions, if there is one."""
        nonlocal available, room
        length = (available & ((2 << share) - 1)).bit_length() - 1
        if length < 0:
            return False
        pattern[length] = pattern.get(length, 0) + 1
        room -= length
        if pattern[length] == count[length]:
            available ^= 1 << length
        return True

    pattern, available, room = {}, left, capacity
    while take(room):
        pass
    if room <= capacity // 256:
        return pattern
    greedy, waste, pieces = pattern, room, sum(pattern.values())
    pattern, available, room = {}, left, capacity
    take(room)
    for others in range(pieces, 1, -1):
        take(room // others)
    while take(room):
        pass
    return pattern if room < waste else greedy


def pack(
    pieces: Sequence[tuple[Sequenced, int, int]], row_length: int, image: ImageConfig
) -> Batch:
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
            latents[slot], start[slot], limit[slot] = (
                span.latent_hwc,
                at + first_patch,
                span.noise_limit,
            )
            slot += 1
        at += end - begin
    return Batch(tokens, segment, position, target, weight, latents, start, limit)
