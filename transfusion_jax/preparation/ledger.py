"""Accounts: what became of the items of every shard, and the ledger that they add up to."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from transfusion_jax.files import write_atomic
from transfusion_jax.preparation.readers.raw import Rejected

KEPT = 3  # rejected items of each reason and shard whose content is kept
KEPT_BYTES = 1 << 18
SHOWN = 5  # of them, of each reason, that are left in the data set
COUNTERS = ("read", "written", "rejected", "captions", "captions_dropped")


@dataclass
class Account:
    """What became of the items of a shard; counters are by (input, reason)."""

    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    captions: Counter = field(default_factory=Counter)
    captions_dropped: Counter = field(default_factory=Counter)
    rejections: list = field(default_factory=list)
    """[input, item, reason, content]; content only of the first few of a reason."""
    index: list = field(default_factory=list)
    """[text, images, held_out] of every record."""
    moments: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """Count, sum and sum of squares of all latents, expected over the posterior."""

    def reject(self, source: str, error: Rejected) -> None:
        kept = self.rejected[source, error.reason] < KEPT
        self.rejected[source, error.reason] += 1
        self.rejections.append(
            [source, error.name, error.reason, error.content[:KEPT_BYTES] if kept else b""]
        )

    def save(self, path: Path, size: int, digest: str) -> None:
        """Writes the account of a shard of this size and SHA-256."""
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
        write_atomic(path, msgpack.packb(packed))


@dataclass(frozen=True)
class Accounts:
    """All accounts of a data set together."""

    ledger: dict[str, Any]
    """Counts of items and captions, by input and in all."""
    shards: list[dict[str, Any]]
    """Documents, bytes and SHA-256 of every shard."""
    index: np.ndarray
    """int32 [3, documents]: text, images, held_out."""
    moments: np.ndarray
    rejections: list[list]


def gather(paths: Iterable[Path]) -> Accounts:
    """Reads the accounts of the shards, in their order, one at a time."""
    by_input: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    shards, index, moments, rejections, kept = [], [], np.zeros(3), [], Counter()
    for path in paths:
        account = msgpack.unpackb(path.read_bytes())
        for name in COUNTERS:
            for source, reason, n in account[name]:
                by_input[source][name][reason] += n
        shards.append({name: account[name] for name in ("documents", "bytes", "sha256")})
        index.append(np.frombuffer(account["index"], "<i4").reshape(-1, 3))
        moments += account["moments"]
        for source, item, reason, content in account["rejections"]:
            kept[reason] += bool(content)
            rejections.append([source, item, reason, content if kept[reason] <= SHOWN else b""])
    return Accounts(_ledger(by_input), shards, np.concatenate(index).T, moments, rejections)


def _ledger(by_input: dict[str, dict[str, Counter]]) -> dict[str, Any]:
    """Items and captions by input, and in all: read = written + rejected."""

    def entry(counts: dict[str, Counter]) -> dict[str, Any]:
        return {
            "items": counts["read"].total(),
            "written": counts["written"].total(),
            "rejected": counts["rejected"].total(),
            "reasons": dict(sorted(counts["rejected"].items())),
            "captions": counts["captions"].total(),
            "captions_dropped": dict(sorted(counts["captions_dropped"].items())),
        }

    total: dict[str, Counter] = defaultdict(Counter)
    for counts in by_input.values():
        for name, counter in counts.items():
            total[name] += counter
    return {
        "inputs": {name: entry(counts) for name, counts in by_input.items()},
        "total": entry(total),
    }


def keep_rejected(rejections: Iterable[list], out: Path) -> None:
    """Lists every rejected item, and keeps the content of a few of each reason for a look."""
    lines, kept = [], Counter()
    for source, item, reason, content in rejections:
        line = {"input": source, "item": item, "reason": reason}
        if content:
            kept[reason] += 1
            ending = (
                Path(item).suffix if reason not in ("invalid UTF-8", "invalid JSON") else ".txt"
            )
            line["kept"] = f"rejected/{reason.replace(' ', '_')}_{kept[reason]}{ending[:8]}"
            (out / "rejected").mkdir(exist_ok=True)
            write_atomic(out / line["kept"], content)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(out / "rejected.jsonl", "".join(lines).encode(errors="backslashreplace"))
