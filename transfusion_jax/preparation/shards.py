"""One shard of prepared data: raw items in, an ArrayRecord file and a ledger of every item out.

A shard is a function of its items and the settings alone, so one that was not finished is made
again.
"""

import contextlib
import errno
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from transfusion_jax import images
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.records import IMAGE, STRADDLING, TEXT, Record
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.files import atomic_path, temporary_of
from transfusion_jax.preparation.ledger import ShardLedger
from transfusion_jax.preparation.readers.raw import Picture, Raw, Reader, Rejected
from transfusion_jax.preparation.splits import split_of

ENCODED = 64  # pictures in one batch of the autoencoder
WRITER = "group_size:1,uncompressed,max_parallelism:1"
"""Options of ArrayRecord: a record is read alone; more threads would take cores from decoding."""

Encode = Callable[[np.ndarray], np.ndarray]
"""Pictures, float32 [n, H, W, C] in [-1, 1], to posteriors, float16 [n, 2, h, w, c], or to codes,
unsigned [n, h, w, 1]."""


@dataclass(frozen=True)
class Settings:
    """What a document is made with."""

    tokenizer: Tokenizer
    height: int
    width: int
    channels: int
    max_caption: int
    held_out: float
    encode: Encode | None
    """None: pixels are kept."""


@dataclass(frozen=True)
class Ready:
    """A document whose text is clean and whose pictures are uint8 [H, W, C]."""

    captions: tuple[str, ...]
    spans: tuple[str | np.ndarray, ...]
    dropped: tuple[str, ...]
    """Why captions were left out, a reason each."""
    split: int
    """TRAIN, HELD_OUT or STRADDLING."""


def load(reader: Reader, index: int, settings: Settings) -> Ready | Rejected:
    """Reads one item: checks its text, decodes its pictures."""
    try:
        raw = reader[index]
        captions, dropped = _captions(raw, settings.max_caption)
        spans = []
        for span in raw.spans:
            if isinstance(span, Picture):
                spans.append(_decode(span, raw.name, settings))
            elif _encodable(span, raw.name).strip():
                spans.append(span)
        if not spans:
            raise Rejected("empty text", raw.name)
        return Ready(captions, tuple(spans), dropped, split_of(spans, settings.held_out))
    except Rejected as error:
        return error


def _decode(picture: Picture, name: str, settings: Settings) -> np.ndarray:
    data = picture.load()
    try:
        return images.decode(data, settings.height, settings.width, settings.channels)
    except ValueError as error:
        raise Rejected(str(error), name, data) from error


def _captions(raw: Raw, longest: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The usable captions of an item, and why others are not; raises Rejected if none is."""
    kept, dropped = [], []
    for caption in (_encodable(caption, raw.name).strip() for caption in raw.captions):
        if not caption:
            dropped.append("empty caption")
        elif len(caption) > longest:
            dropped.append("huge caption")
        else:
            kept.append(caption)
    if dropped and not kept:
        raise Rejected(dropped[0], raw.name, raw.captions[0].encode())
    return tuple(kept), tuple(dropped)


def _encodable(text: str, name: str) -> str:
    """The text itself; JSON can spell half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("invalid UTF-8", name, text.encode(errors="backslashreplace")) from error
    return text


def write_shard(
    loaded: Iterable[tuple[str, Ready | Rejected]],
    path: Path,
    settings: Settings,
    progress: Callable[[int], Any],
) -> ShardLedger:
    """Writes the items of one shard, in order, to a file that `finish_shard` gives its name."""
    ledger = ShardLedger()
    ids = records.id_type(settings.tokenizer.size)
    with _writer(temporary_of(path)) as writer:
        for group in _groups(loaded, ENCODED):
            documents = []
            for source, item in group:
                ledger.read[source, ""] += 1
                if isinstance(item, Rejected):
                    ledger.reject(source, item)
                else:
                    documents.append((source, item))
            for (source, ready), record in zip(
                documents, _records(documents, settings, ledger), strict=True
            ):
                writer.write(records.encode(record, ids))
                ledger.written[source, ""] += 1
                ledger.captions[source, ""] += len(ready.captions) + len(ready.dropped)
                ledger.captions_dropped.update((source, reason) for reason in ready.dropped)
                ledger.index.append([*records.entry(record), ready.split])
                ledger.straddling[source, ""] += ready.split == STRADDLING
            progress(len(group))
    return ledger


def finish_shard(ledger: ShardLedger, path: Path, ledger_path: Path) -> None:
    """Gives a written shard its name, and then writes its ledger, which says that it is done."""
    with atomic_path(path) as partial, partial.open("rb") as file:
        size = partial.stat().st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    ledger.save(ledger_path, size, digest)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
    """An ArrayRecord writer, closed at the end; raises OSError if the disk is full or fails."""
    writer = None  # the constructor creates the file, and may find the disk full
    try:
        writer = ArrayRecordWriter(str(path), WRITER)
        yield writer
        writer.close()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            if writer is not None:
                writer.close()
        path.unlink(missing_ok=True)
        known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        number = next((n for n in known if os.strerror(n) in str(error)), None)
        if number is None or not isinstance(error, RuntimeError):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def in_order(
    items: Iterable[tuple[str, Reader, int]], settings: Settings, executor: Executor, ahead: int
) -> Iterator[tuple[str, Ready | Rejected]]:
    """Loads items on the executor, `ahead` of them at a time, and yields them in order."""
    waiting: deque = deque()
    for source, reader, index in items:
        waiting.append((source, executor.submit(load, reader, index, settings)))
        if len(waiting) >= ahead:
            source, future = waiting.popleft()
            yield source, future.result()
    for source, future in waiting:
        yield source, future.result()


def _records(
    documents: Sequence[tuple[str, Ready]], settings: Settings, ledger: ShardLedger
) -> Iterator[Record]:
    """Tokenises a group of documents, and encodes their pictures as one batch."""
    pictures = [
        span for _, ready in documents for span in ready.spans if isinstance(span, np.ndarray)
    ]
    if settings.encode is not None and pictures:
        pictures = [
            encoded
            for batch in _groups(pictures, ENCODED)
            for encoded in _encoded(np.stack(batch), settings.encode)
        ]
        if pictures[0].dtype == np.float16:
            ledger.moments += sum(map(_moments, pictures))
    stored, tokens = iter(pictures), settings.tokenizer.encode
    for _, ready in documents:
        yield Record(
            tuple(np.asarray(tokens(caption)) for caption in ready.captions),
            tuple(
                (TEXT, np.asarray(tokens(span))) if isinstance(span, str) else (IMAGE, next(stored))
                for span in ready.spans
            ),
        )


def _groups(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


def _encoded(pixels: np.ndarray, encode: Encode) -> np.ndarray:
    """Encodes a batch, filled up so that one size is compiled."""
    missing = ENCODED - len(pixels)
    filled = (
        np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]) if missing else pixels
    )
    return encode(images.from_uint8(filled))[: len(pixels)]


def _moments(posterior: np.ndarray) -> np.ndarray:
    mean, std = posterior.astype(np.float64)
    return np.asarray([mean.size, mean.sum(), np.sum(mean**2 + std**2)])
