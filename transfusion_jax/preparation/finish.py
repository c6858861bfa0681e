"""The end of a preparation: the ledgers of all shards become one data set.

What training needs to know of the data alone is computed here, once, in files that every process of
a run can memory-map.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transfusion_jax.data.sources.dataset import FORMAT, ImageStatistics, file_digest
from transfusion_jax.data.sources.records import HELD_OUT, SPLITS, STRADDLING, Index
from transfusion_jax.errors import WorkFailed
from transfusion_jax.files import atomic_path, write_atomic
from transfusion_jax.preparation.ledger import Totals, add_up, index_entries, keep_rejected
from transfusion_jax.preparation.readers.inputs import Input
from transfusion_jax.preparation.shards import Settings
from transfusion_jax.preparation.workers import Job

if TYPE_CHECKING:
    from transfusion_jax.autoencoder.codec import Codec

BLOCK = 1 << 22  # entries of the index that are looked at together


class PreparationFailed(WorkFailed):
    """The work ran, and its outcome is no data set."""


def finish_dataset(
    job: Job,
    inputs: Sequence[Input],
    reject_limit: float,
    identity: dict[str, Any],
    stamps: dict[str, str],
    codec: Codec | None,
) -> dict[str, Any]:
    """Writes all files of a data set but its shards, dataset.json last, and returns its content.

    Raises:
      PreparationFailed: more items were rejected than may be, or none is left.
    """
    out = job.out
    ledgers = [job.ledger(k) for k in range(job.shards)]
    totals = add_up(ledgers)
    for found in inputs:
        entry = totals.ledger["inputs"].setdefault(found.name, {})
        entry["files_not_read"] = dict(found.unread)
    write_atomic(out / "ledger.json", as_json(totals.ledger))
    keep_rejected(totals.rejections, out)
    _check_rejected(totals, reject_limit, out)
    index = write_index(out, index_entries(ledgers), totals.documents)
    image = _image(job.settings, codec, totals.moments)
    dataset = {
        "format": FORMAT,
        "documents": totals.documents,
        "held_out": int(np.count_nonzero(index.split == HELD_OUT)),
        "straddle_the_split": int(np.count_nonzero(index.split == STRADDLING)),
        "text_tokens": int(index.text.sum(dtype=np.int64)),
        "images": int(index.images.sum(dtype=np.int64)),
        "image": image,
        "training_images": dataclasses.asdict(ImageStatistics.of(index)),
        "tokenizer": {
            "entries": job.settings.tokenizer.size,
            "sha256": hashlib.sha256(job.settings.tokenizer.model).hexdigest(),
        },
        "shards": [{"name": job.shard(k).name, **shard} for k, shard in enumerate(totals.shards)],
        "index_sha256": file_digest(out / "index.npy"),
        "files": {
            name: {"bytes": (out / name).stat().st_size, "sha256": file_digest(out / name)}
            for name in ("index.npy", *(f"splits/{split}.npy" for split in SPLITS))
        },
        "ledger": totals.ledger["total"],
        "identity": identity,
        "stamps": stamps,
    }
    if codec:
        from transfusion_jax.autoencoder.codec import save_codec

        save_codec(
            out / "autoencoder", codec.config, codec.parameters, image["scale"], image["shift"]
        )
    write_atomic(out / "dataset.json", as_json(dataset))
    return json.loads(as_json(dataset))


def _check_rejected(totals: Totals, reject_limit: float, out: Path) -> None:
    total = totals.ledger["total"]
    if total["rejected"] > reject_limit * total["items"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in total["reasons"].items())
        raise PreparationFailed(
            f"{total['rejected']} of {total['items']} items were rejected ({reasons}), more than "
            f"reject_limit={reject_limit:g}; they are listed in {out / 'rejected.jsonl'}"
        )
    if totals.documents == 0:
        raise PreparationFailed("no document is left")


def write_index(out: Path, entries: Iterator[np.ndarray], documents: int) -> Index:
    """Writes `index.npy` and `splits/*.npy`, and returns the index, memory-mapped.

    Args:
      entries: int32 [n, 3] of text, images and split, in order.
      documents: how many there are in all.
    """
    with atomic_path(out / "index.npy") as path:
        stored = np.lib.format.open_memmap(path, "w+", np.dtype("<i4"), (3, documents))
        at = 0
        for block in entries:
            stored[:, at : at + len(block)] = block.T
            at += len(block)
        stored.flush()
    index = Index(*np.load(out / "index.npy", mmap_mode="r"))
    (out / "splits").mkdir(exist_ok=True)
    for name, split in SPLITS.items():
        count = int(np.count_nonzero(index.split == split))
        _write_numbers(out / "splits" / f"{name}.npy", index.split, split, count)
    return index


def _write_numbers(file: Path, splits: np.ndarray, split: int, count: int) -> None:
    """Writes the numbers of the documents of a split, in order."""
    dtype = np.dtype("<u4" if len(splits) < 1 << 32 else "<i8")
    with atomic_path(file) as path, path.open("wb") as opened:
        np.lib.format.write_array_header_2_0(
            opened, {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
        )
        for begin in range(0, len(splits), BLOCK):
            found = np.flatnonzero(splits[begin : begin + BLOCK] == split) + begin
            opened.write(found.astype(dtype).tobytes())
        opened.flush()
        os.fsync(opened.fileno())


def _image(settings: Settings, codec: Codec | None, moments: np.ndarray) -> dict[str, Any]:
    """How images are stored; latents are fed to a model as (latent - shift) * scale, codes as they
    are."""
    pixels = [settings.height, settings.width, settings.channels]
    if codec is None:
        return {"stored": "pixels", "pixels": pixels, "shape": pixels}
    latent = codec.latent_shape(settings.height, settings.width)
    if codec.config.kind == "vq":
        return {
            "stored": "codes",
            "pixels": pixels,
            "shape": [*latent[:2], 1],
            "codes": codec.config.codes,
            "autoencoder": codec.digest,
            "shift": codec.shift,
            "scale": codec.scale,
        }
    count, total, squares = moments
    mean = total / max(count, 1)
    std = float(np.sqrt(max(squares / max(count, 1) - mean**2, 1e-12)))
    # An autoencoder's own scale is used as it is, so that data sets made with it can be mixed.
    own = (codec.scale, codec.shift) != (1.0, 0.0)
    return {
        "stored": "latents",
        "pixels": pixels,
        "shape": list(latent),
        "autoencoder": codec.digest,
        "measured_mean": mean,
        "measured_std": std,
        "shift": codec.shift if own else mean,
        "scale": codec.scale if own else 1 / std,
    }


def as_json(value: Any) -> bytes:
    """JSON, also of names that are invalid Unicode."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"
    )
