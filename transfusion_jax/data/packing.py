"""Packing: which documents make which row, from their lengths alone; and the row itself.

Text alone is cut freely and fills its rows. With images, every row starts with the longest document
that is left and is filled as well as the others allow (best-fit packing: Ding et al. 2024, arXiv
2404.10830); then only text longer than a row is cut.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import ImageConfig
from transfusion_jax.data.documents import Sequenced
from transfusion_jax.host import cores

BLOCK = 1 << 22  # documents that are planned together
THREADS = 4  # that plan, at most
DIGESTED = 1 << 22  # entries of an array that are digested together


@dataclass(frozen=True)
class Plan:
    """Row r holds pieces row_start[r] ... row_start[r + 1] - 1, each [begin, end) of a document.

    Every document is in some row or in `rejected`. The arrays may be memory-mapped.
    """

    VERSION: ClassVar[int] = 2
    """Of the algorithm; a cached plan is used under the same version only."""

    row_start: np.ndarray
    """int64."""
    document: np.ndarray
    """uint32, as are `begin` and `end`."""
    begin: np.ndarray
    end: np.ndarray
    rejected: dict[str, np.ndarray]
    """Reason -> documents."""
    in_rows: int
    """Documents that have a piece in some row."""
    positions: int
    """That pieces take, in all rows."""

    @classmethod
    def of(
        cls,
        row_start: np.ndarray,
        document: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        rejected: dict[str, np.ndarray],
    ) -> "Plan":
        """The plan with these pieces, counted."""
        in_rows = int(np.count_nonzero(begin == 0))
        positions = int(end.sum(dtype=np.int64)) - int(begin.sum(dtype=np.int64))
        return cls(row_start, document, begin, end, rejected, in_rows, positions)

    def __len__(self) -> int:
        return len(self.row_start) - 1

    def row(self, r: int) -> list[tuple[int, int, int]]:
        """(document, begin, end) of every piece of row r."""
        pieces = slice(int(self.row_start[r]), int(self.row_start[r + 1]))
        return list(
            zip(*(x[pieces].tolist() for x in (self.document, self.begin, self.end)), strict=True)
        )

    def filled(self, row_length: int) -> float:
        """Share of positions that hold a document."""
        return self.positions / max(len(self) * row_length, 1)

    def ledger(self) -> dict:
        """Counts: documents = in rows + rejected, by reason; and rows."""
        rejected = {reason: len(documents) for reason, documents in self.rejected.items()}
        return {
            "documents": self.in_rows + sum(rejected.values()),
            "in_rows": self.in_rows,
            "rejected": rejected,
            "rows": len(self),
        }

    def fingerprint(self, content: bytes) -> str:
        """A digest of the plan and of what identifies the content of its documents."""
        digest = hashlib.sha256(content)
        for array in (self.row_start, self.document, self.begin, self.end):
            for at in range(0, len(array), DIGESTED):
                digest.update(array[at : at + DIGESTED].astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


def plan(lengths: np.ndarray, row_length: int, splittable: bool | np.ndarray) -> Plan:
    """Packs documents of these lengths; only those that are `splittable` may be cut at a row's
    end.

    Threads plan `BLOCK` documents at a time, so that memory beside the plan's own is bounded.
    """
    lengths = np.asarray(lengths)
    splittable = np.broadcast_to(splittable, lengths.shape)

    def planned(first: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        block = slice(first, first + BLOCK)
        rejected, *arrays = _plan_block(lengths[block], row_length, splittable[block], first)
        return rejected, arrays

    with ThreadPoolExecutor(min(cores(), THREADS)) as executor:
        blocks = list(executor.map(planned, range(0, max(len(lengths), 1), BLOCK)))
    reasons: dict[str, list[np.ndarray]] = {}
    for rejected, _ in blocks:
        for reason, documents in rejected.items():
            reasons.setdefault(reason, []).append(documents)
    pieces, *arrays = (_joined([arrays for _, arrays in blocks], i) for i in range(4))
    row_start = np.concatenate([[0], np.cumsum(pieces)], dtype=np.int64)
    return Plan.of(row_start, *arrays, {reason: np.concatenate(x) for reason, x in reasons.items()})


def _plan_block(
    lengths: np.ndarray, row_length: int, splittable: np.ndarray, first: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What is rejected and why; the number of pieces of each row; documents, begins and ends of the
    pieces. Documents are numbered from `first`."""
    rejected = {"empty": lengths < 1, "longer than a row": ~splittable & (lengths > row_length)}
    reasons = {reason: np.flatnonzero(bad) + first for reason, bad in rejected.items() if bad.any()}
    # A fixed shuffle, so that neighbours in the data are not neighbours in a row.
    document = np.random.default_rng(first).permutation(np.arange(len(lengths), dtype=np.uint32))
    if reasons:
        document = document[~(rejected["empty"] | rejected["longer than a row"])[document]]
    if splittable.all():
        row, document, begin, end = _concatenate(document, lengths, row_length)
    else:
        document, begin, end = _cut(document, lengths, row_length)
        row = _by_patterns(end - begin, row_length)
        order = _stable_order(row)
        document, begin, end = document[order], begin[order], end[order]
    return reasons, np.bincount(row), document + np.uint32(first), begin, end


def _joined(blocks: list[list[np.ndarray]], i: int) -> np.ndarray:
    """Array i of all blocks, which let go of it."""
    found = [block[i] for block in blocks]
    for block in blocks:
        block[i] = None
    return np.concatenate(found)


def _concatenate(
    document: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, ...]:
    """Rows, documents, begins and ends of pieces when documents follow one another and rows cut
    freely."""
    length = lengths[document].astype(np.int64)
    stop = np.cumsum(length)
    start = stop - length
    first = start // row_length
    pieces = (stop - 1) // row_length - first + 1
    owner = np.repeat(np.arange(len(document), dtype=np.uint32), pieces)
    row = first[owner] + _count_up(pieces)
    begin = np.maximum(row * row_length - start[owner], 0).astype(np.uint32)
    end = np.minimum((row + 1) * row_length - start[owner], length[owner]).astype(np.uint32)
    return row, document[owner], begin, end


def _cut(
    document: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents, begins and ends of pieces, none longer than a row."""
    length = lengths[document].astype(np.uint32)
    pieces = (length - 1) // np.uint32(row_length) + 1
    if len(document) and pieces.max() > 1:
        owner = np.repeat(np.arange(len(document), dtype=np.uint32), pieces)
        begin = (_count_up(pieces) * row_length).astype(np.uint32)
        length = length[owner]
        document = document[owner]
    else:
        begin = np.zeros(len(document), np.uint32)
    return document, begin, np.minimum(length, begin + np.uint32(row_length))


def _count_up(pieces: np.ndarray) -> np.ndarray:
    """0, 1, ... for each: [2, 3] becomes [0, 1, 0, 1, 2]."""
    pieces = pieces.astype(np.int64)
    before = np.cumsum(pieces) - pieces
    return np.arange(pieces.sum()) - np.repeat(before, pieces)


def _stable_order(row: np.ndarray) -> np.ndarray:
    """`argsort(row, stable)`: twice by 16 bits, which numpy sorts in linear time."""
    low = np.argsort((row & 0xFFFF).astype(np.uint16), kind="stable").astype(np.uint32)
    high = np.argsort((row >> 16)[low].astype(np.uint16), kind="stable")
    return low[high]


def _by_patterns(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of every piece, none longer than a row.

    Lengths repeat, so rows do: a pattern, which says how many pieces of each length a row takes, is
    used as often as the remaining pieces allow. Work grows with the number of patterns, not pieces.
    """
    row = np.zeros(len(lengths), np.uint32)
    rows = 0
    if capacity < 1 << 16:  # numpy sorts these in linear time
        lengths = lengths.astype(np.uint16)
    order = np.argsort(lengths, kind="stable").astype(np.uint32)
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
    """Lengths, and how many of each, that fill one row well; the greatest length left is in it.

    Bit l of `left` says whether pieces of length l are left. Greedy takes the longest piece that
    fits until none does. That fills a row unless all lengths are alike, as those of pairs are:
    thirteen of 300 leave 196 of 4,096 empty. Then one piece more is tried, each as close as
    possible to an equal share of the room.
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
    pieces: Sequence[tuple[Sequenced, int, int]],
    row_length: int,
    image: ImageConfig,
    slots: int | None = None,
) -> Batch:
    """One row, a `Batch` without its leading dimension, from [begin, end) of each document.

    It has so many `slots` for images: as many as fit, unless another number is given.
    """
    L = row_length
    M = slots or max(L // image.span, 1)
    tokens, segment, position, target = (np.zeros(L, np.int32) for _ in range(4))
    weight = np.zeros(L, np.float32)
    latents = np.zeros((M, *image.shape), np.float32)
    start = np.full(M, L, np.int32)
    limit = np.ones(M, np.int32)
    at = slot = 0
    for number, (document, begin, end) in enumerate(pieces, 1):
        # A document may be shorter than planned: a caption may have been dropped.
        end = min(end, len(document.tokens))
        here = slice(at, at + end - begin)
        tokens[here] = document.tokens[begin:end]
        target[here] = document.target[begin:end]
        weight[here] = document.weight[begin:end]
        segment[here] = number
        position[here] = np.arange(end - begin)
        for first_patch, span in document.images:
            latents[slot] = span.latent_hwc
            start[slot] = at + first_patch
            limit[slot] = span.noise_limit
            slot += 1
        at += end - begin
    return Batch(tokens, segment, position, target, weight, latents, start, limit)
