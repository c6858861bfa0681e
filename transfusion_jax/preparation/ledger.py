"""The ledger: what became of every item, counted by each shard and added up over all.

Items read = written + rejected, by input and reason. Of what was written, documents that straddle
the split are counted too, because no training run and no evaluation reads them.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from transfusion_jax.files import write_atomic
from transfusion_jax.preparation.readers.raw import PICTURES, Rejected

KEPT = 3  # rejected items of each reason and shard whose content is kept
KEPT_BYTES = 1 << 18  # of an item
SHARD_KEEPS = 1 << 20  # bytes, for all reasons
SHOWN = 5  # of them, for each reason, that are left in the data set
COUNTERS = ("read", "written", "rejected", "straddling", "captions", "captions_dropped")
TEXTS = ("invalid UTF-8", "invalid JSON", "not a document", "ambiguous keys")
ENDINGS = (*PICTURES, ".txt", ".json")


@dataclass
class ShardLedger:
    """What became of the items of a shard; counters are by (input, reason)."""

    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    straddling: Counter = field(default_factory=Counter)
    """Of the written ones, those in neither split."""
    captions: Counter = field(default_factory=Counter)
    captions_dropped: Counter = field(default_factory=Counter)
    rejections: list = field(default_factory=list)
    """[input, item, reason, content]; content of the first few of a reason only."""
    index: list = field(default_factory=list)
    """[text, images, split] of every record."""
    moments: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """Count, sum and sum of squares of all latents, expected over the posterior."""
    kept_bytes: int = 0
    """Of the contents in `rejections`."""

    def reject(self, source: str, error: Rejected) -> None:
        """Counts an item, and keeps its content if few were kept before."""
        content = error.content[:KEPT_BYTES]
        if (
            self.rejected[source, error.reason] >= KEPT
            or self.kept_bytes + len(content) > SHARD_KEEPS
        ):
            content = b""
        self.kept_bytes += len(content)
        self.rejected[source, error.reason] += 1
        self.rejections.append([source, error.name, error.reason, content])

    def save(self, path: Path, size: int, digest: str) -> None:
        """Writes the ledger of a shard of this size and SHA-256."""
        packed = {
            "sha256": digest,
            "bytes": size,
            "documents": len(self.index),
            "index": np.asarray(self.index, "<i4").tobytes(),
            "rejections": self.rejections,
            "moments": self.moments.tolist(),
            **{
                name: [[*key, n] for key, n in sorted(getattr(self, name).items())]
                for name in COUNTERS
            },
        }
        # Names of inputs may be invalid Unicode.
        write_atomic(path, msgpack.packb(packed, unicode_errors="surrogatepass"))


@dataclass(frozen=True)
class Totals:
    """The ledgers of all shards together."""

    ledger: dict[str, Any]
    """Counts of items and captions, by input and in all."""
    shards: list[dict[str, Any]]
    """Documents, bytes and SHA-256 of every shard."""
    moments: np.ndarray
    rejections: list[list]

    @property
    def documents(self) -> int:
        return sum(shard["documents"] for shard in self.shards)


def _load(path: Path) -> dict[str, Any]:
    """What `ShardLedger.save` wrote."""
    return msgpack.unpackb(path.read_bytes(), unicode_errors="surrogatepass")


def add_up(paths: Iterable[Path]) -> Totals:
    """Reads the ledgers of the shards, in their order, one at a time."""
    by_input: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    shards = []
    moments = np.zeros(3)
    rejections = []
    kept = Counter()
    for path in paths:
        shard = _load(path)
        for name in COUNTERS:
            for source, reason, n in shard[name]:
                by_input[source][name][reason] += n
        shards.append({name: shard[name] for name in ("documents", "bytes", "sha256")})
        moments += shard["moments"]
        for source, item, reason, content in shard["rejections"]:
            kept[reason] += bool(content)
            rejections.append([source, item, reason, content if kept[reason] <= SHOWN else b""])
    return Totals(_ledger(by_input), shards, moments, rejections)


def index_entries(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """The index of every shard, in their order: int32 [documents, 3] of text, images and split."""
    for path in paths:
        yield np.frombuffer(_load(path)["index"], "<i4").reshape(-1, 3)


def _ledger(by_input: dict[str, dict[str, Counter]]) -> dict[str, Any]:
    """Items and captions by input, and in all: read = written + rejected."""
    total: dict[str, Counter] = defaultdict(Counter)
    for counts in by_input.values():
        for name, counter in counts.items():
            total[name] += counter
    return {
        "inputs": {name: _entry(counts) for name, counts in by_input.items()},
        "total": _entry(total),
    }


def _entry(counts: dict[str, Counter]) -> dict[str, Any]:
    return {
        "items": counts["read"].total(),
        "written": counts["written"].total(),
        "rejected": counts["rejected"].total(),
        "reasons": dict(sorted(counts["rejected"].items())),
        "straddle the split": counts["straddling"].total(),
        "captions": counts["captions"].total(),
        "captions_dropped": dict(sorted(counts["captions_dropped"].items())),
    }


def keep_rejected(rejections: Sequence[list], out: Path) -> None:
    """Lists every rejected item, and keeps the content of a few of each reason for a look."""
    lines = []
    kept = Counter()
    for source, item, reason, content in rejections:
        line = {"input": source, "item": item, "reason": reason}
        if content:
            kept[reason] += 1
            line["kept"] = f"rejected/{_slug(reason)}_{kept[reason]}{_ending(item, reason)}"
            (out / "rejected").mkdir(exist_ok=True)
            write_atomic(out / line["kept"], content)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(out / "rejected.jsonl", "".join(lines).encode(errors="backslashreplace"))


def _slug(reason: str) -> str:
    return re.sub("[^A-Za-z0-9-]+", "_", reason)


def _ending(item: str, reason: str) -> str:
    """The ending of a kept file: a known one, because the name of an item may hold anything."""
    if reason in TEXTS:
        return ".txt"
    return next((ending for ending in ENDINGS if item.lower().endswith(ending)), ".bin")
