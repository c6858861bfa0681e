"""What starting a run costs at a hundred million documents, with index files of that size.

    python benchmarks/scale.py --documents 100000000

A finished data set of pairs is written first, as `prepare --finish` leaves it: index, splits and
dataset.json are real; all shards of 1 GiB are links to one, so every document can be read. Each
start is a process of its own that finds none of these files in the page cache, opens the training
and the held-out data, and ends with a batch of each. The first start also makes the packing plans,
which one process of a new run does while the others wait; all later starts find them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from read_rows import IMAGE, write_shard

from transfusion_jax.config import DataConfig, Experiment, SourceConfig
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import FORMAT, ImageStatistics, file_digest, open_dataset
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.preparation.finish import write_index

SHARD = (1 << 30) // (2 * 2 * int(np.prod(IMAGE.shape)))  # documents of a shard of 1 GiB
HELD_OUT = 0.001
GIB = 1 << 30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--starts", type=int, default=3, help="processes, one after another")
    parser.add_argument(
        "--directory", type=Path, help="parent of the data set (the system's temporary directory)"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_dataset(folder: Path, documents: int) -> None:
    """A finished data set of so many pairs."""
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(["synthetic text"], 300)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    lengths = np.clip(rng.lognormal(np.log(30), 0.5, SHARD), 1, 500).astype(np.int32)
    (folder / "shards").mkdir()
    count = -(-documents // SHARD)
    shards = [{"name": f"{k:06}.arrayrecord", "documents": SHARD} for k in range(count)]
    shards[-1]["documents"] = documents - SHARD * (count - 1)
    first = folder / "shards" / shards[0]["name"]
    posteriors = np.abs(rng.standard_normal((64, 2, *IMAGE.shape), np.float32)).astype(np.float16)
    write_shard(first, lengths, posteriors, tokenizer, rng)
    for shard in shards:
        if shard is not shards[0]:
            os.link(first, folder / "shards" / shard["name"])
        shard["bytes"] = first.stat().st_size
    index = write_index(folder, entries(lengths, documents), documents)
    files = ("index.npy", *(f"splits/{split}.npy" for split in records.SPLITS))
    info = {
        "format": FORMAT,
        "images": documents,
        "image": {
            "stored": "latents",
            "shape": IMAGE.shape,
            "shift": 0.0,
            "scale": 1.0,
            "autoencoder": "none; the latents are random",
        },
        "training_images": vars(ImageStatistics.of(index)),
        "tokenizer": {"entries": tokenizer.size},
        "shards": shards,
        "index_sha256": file_digest(folder / "index.npy"),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
            for name in files
        },
    }
    (folder / "dataset.json").write_text(json.dumps(info))


def entries(lengths: np.ndarray, documents: int) -> Iterator[np.ndarray]:
    """int32 [n, 3] of text, images and split, shard by shard."""
    rng = np.random.default_rng(2)
    for begin in range(0, documents, len(lengths)):
        text = lengths[: documents - begin]
        split = np.where(rng.random(len(text)) < HELD_OUT, records.HELD_OUT, records.TRAIN)
        yield np.stack([text, np.ones_like(text), split], axis=1).astype(np.int32)


def forget(folder: Path) -> None:
    """Takes all files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(name: str) -> int:
    """Bytes of this process, of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {name}")


def bytes_read() -> int:
    """That this process has fetched from storage, memory-mapped files included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class Peak(threading.Thread):
    """The most memory of its own that this process holds at a time, mapped files left out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = memory("RssAnon")
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, memory("RssAnon"))


def measure(folder: Path) -> dict[str, float]:
    """Opens both splits, as a run does, and reads a batch of each."""
    data = DataConfig(sources=(SourceConfig(str(folder)),), row_length=4096, batch_rows=8)
    experiment = Experiment(name="scale", image=IMAGE, data=data)
    peak = Peak()
    peak.start()
    at, begin = bytes_read(), time.perf_counter()
    tokenizer = open_dataset(folder).tokenizer
    training = Data(experiment, tokenizer)
    held_out = Data(experiment, tokenizer, "held_out")
    for opened in (training, held_out):
        opened.ledger()
        opened.fingerprints()
    opened = time.perf_counter() - begin
    batch = next(read(training.batches(), 0, data.prefetch))
    next(held_out.once(data.batch_rows, 512))
    peak.done.set()
    return {
        "opened": opened,
        "seconds": time.perf_counter() - begin,
        "read": bytes_read() - at,
        "added": peak.most - peak.first,
        "images": int((batch.image_start_BM < data.row_length).sum()),
    }


def start(folder: Path) -> dict[str, float]:
    """Measures one start, in a process of its own."""
    forget(folder)
    command = [sys.executable, __file__, "--measure", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    args = arguments()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        begin = time.perf_counter()
        write_dataset(folder, args.documents)
        kept = sum((folder / x).stat().st_size for x in ("index.npy", "dataset.json"))
        print(
            f"{args.documents:,} documents in {-(-args.documents // SHARD):,} shards, "
            f"index and dataset.json {kept / GIB:.2f} GiB; "
            f"written in {time.perf_counter() - begin:.0f} s"
        )
        for number in range(args.starts):
            found = start(folder)
            print(
                f"start {number + 1}: open after {found['opened']:.1f} s, first batches after "
                f"{found['seconds']:.1f} s; {found['read'] / GIB:.3f} GiB read from storage, "
                f"{found['added'] / GIB:.2f} GiB of memory added at most (mapped files apart); "
                f"{found['images']} images in the batch",
                flush=True,
            )
        plans = sum(path.stat().st_size for path in (folder / "plans").rglob("*.npy"))
        print(f"packing plans: {plans / GIB:.2f} GiB on disk")


if __name__ == "__main__":
    main()
