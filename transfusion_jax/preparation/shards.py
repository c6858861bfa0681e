"""One shard of prepared data: raw items in, an ArrayRecord file and an account of every item out.

A shard is a function of its items and the settings alone, so a shard that was not finished is simply made again.
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
from transfusion_jax.data.sources.records import IMAGE, TEXT, Record
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.files import atomic_path, temporary_of
from transfusion_jax.preparation.ledger import Account
from transfusion_jax.preparation.readers.raw import Picture, Raw, Reader, Rejected

ENCODED = 64  # pictures in one batch of the autoencoder

Encode = Callable[[np.ndarray], np.ndarray]
"""Pictures, float32 [n, H, W, C] in [-1, 1], to posteriors, float16 [n, 2, h, w, c]."""


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
    held_out: bool


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
        return Ready(captions, tuple(spans), dropped, is_held_out(spans, settings.held_out))
    except Rejected as error:
        return error


def _decode(picture: Picture, name: str, settings: Settings) -> np.ndarray:
    data = picture.load()
    try:
        return images.decode(data, settings.height, settings.width, settings.channels)
    except ValueError as error:
        raise Rejected(str(error), name, data) from error


def _captions(raw: Raw, longest: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The usable captions of an item, and why the others are not; raises Rejected if none is left."""
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
) -> Account:
    """Writes the items of one shard, in order; the file has its name after `finish_shard` only."""
    account, ids = Account(), records.id_type(settings.tokenizer.size)
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        stale.unlink(missing_ok=True)
    with _writer(temporary_of(path)) as writer:
        for group in _groups(loaded, ENCODED):
            documents = []
            for source, item in group:
                account.read[source, ""] += 1
                if isinstance(item, Rejected):
                    account.reject(source, item)
                else:
                    documents.append((source, item))
            for (source, ready), record in zip(
                documents, _records(documents, settings, account), strict=True
            ):
                writer.write(records.encode(record, ids))
                account.written[source, ""] += 1
                account.captions[source, ""] += len(ready.captions) + len(ready.dropped)
                account.captions_dropped.update((source, reason) for reason in ready.dropped)
                account.index.append([*records.entry(record), ready.held_out])
            progress(len(group))
    return account


def finish_shard(account: Account, path: Path, account_path: Path) -> None:
    """Puts a shard that is written in its place, and then its account, which says that it is there."""
    with atomic_path(path) as partial, partial.open("rb") as file:
        size, digest = partial.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    account.save(account_path, size, digest)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[ArrayRecordWriter]:
    """A writer of ArrayRecord that is closed in the end; it says with a RuntimeError that the disk is full."""
    writer = None  # the file is there before its writer, which may find the disk full
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        yield writer
        writer.close()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            if writer is not None:
                writer.close()
        path.unlink(missing_ok=True)
        known = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
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
    documents: Sequence[tuple[str, Ready]], settings: Settings, account: Account
) -> Iterator[Record]:
    """Tokenises a group of documents, and encodes their pictures as one batch."""
    pictures = [
        span for _, ready in documents for span in ready.spans if isinstance(span, np.ndarray)
    ]
    if settings.encode is not None and pictures:
        posteriors = [
            posterior
            for batch in _groups(pictures, ENCODED)
            for posterior in _posteriors(np.stack(batch), settings.encode)
        ]
        account.moments += sum(map(_moments, posteriors))
        pictures = posteriors
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


def _posteriors(pixels: np.ndarray, encode: Encode) -> np.ndarray:
    """Encodes a batch, filled up so that one size is compiled."""
    missing = ENCODED - len(pixels)
    filled = (
        np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]) if missing else pixels
    )
    return encode(images.from_uint8(filled))[: len(pixels)]


def _moments(posterior: np.ndarray) -> np.ndarray:
    mean, std = posterior.astype(np.float64)
    return np.asarray([mean.size, mean.sum(), np.sum(mean**2 + std**2)])


def is_held_out(spans: Sequence[str | np.ndarray], share: float) -> bool:
    """Whether a document is kept from training, by a hash of its pictures, or of its text if it has none.

    So neither names nor order nor number matter, and what is the same, or has the same picture, is on the same side.
    """
    digest = hashlib.sha256()
    pictures = [
        np.ascontiguousarray(span[::8]) for span in spans if isinstance(span, np.ndarray)
    ]  # rows enough
    for content in pictures or [span.encode() for span in spans]:
        digest.update(content)
    return int.from_bytes(digest.digest()[:8]) < share * 2**64
