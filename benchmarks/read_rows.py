"""Speed and memory of reading packed rows as training does, against the limits of the machine.

    python benchmarks/read_rows.py --rows 10000

A prepared data set of pairs is written to local disk first: posteriors of 32x32x8 latents in half
precision, and captions of about thirty tokens. Rows of 4,096 positions in patches of 2x2 hold
fourteen or fifteen images.

The bound is the time to read the stored bytes of a row from the same files, in random order and
with the same page cache, and to copy the row once in memory.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from transfusion_jax.config import DataConfig, Experiment, ImageConfig, SourceConfig
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import FORMAT
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.host import keep_freed_memory

IMAGE = ImageConfig(32, 32, 8, 2)
THREADS = 4
"""As many as `read` uses at most."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="rows to read, rounded to batches")
    parser.add_argument("--batch", type=int, default=8, help="rows per batch")
    parser.add_argument("--pairs", type=int, default=32_768, help="documents on disk, 32 kB each")
    parser.add_argument(
        "--directory", type=Path, help="parent of the data set (the system's temporary directory)"
    )
    return parser.parse_args()


def write_dataset(directory: Path, pairs: int, tokenizer: Tokenizer) -> None:
    """A finished data set as `prepare` leaves it."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(30), 0.5, pairs).astype(int), 1, 500)
    posteriors = np.abs(rng.standard_normal((64, 2, *IMAGE.shape), np.float32)).astype(np.float16)
    (directory / "shards").mkdir()
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    index = np.stack([lengths, np.ones(pairs), np.zeros(pairs)]).astype(np.int32)
    np.save(directory / "index.npy", index)
    shards = []
    for shard in np.array_split(lengths, -(-pairs // 4096)):
        path = directory / "shards" / f"{len(shards):06}.arrayrecord"
        write_shard(path, shard, posteriors, tokenizer, rng)
        shards.append({"name": path.name, "documents": len(shard), "bytes": path.stat().st_size})
    info = {
        "format": FORMAT,
        "images": pairs,
        "image": {
            "stored": "latents",
            "shape": IMAGE.shape,
            "shift": 0.1,
            "scale": 1.1,
            "autoencoder": "none; the latents are random",
        },
        "tokenizer": {"entries": tokenizer.size},
        "shards": shards,
        "index_sha256": hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest(),
    }
    (directory / "dataset.json").write_text(json.dumps(info))


def write_shard(
    path: Path,
    lengths: np.ndarray,
    posteriors: np.ndarray,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> None:
    """Pairs with captions of these lengths and one of the posteriors each."""
    ids = records.id_type(tokenizer.size)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for number, length in enumerate(lengths):
        caption = rng.integers(tokenizer.boi, size=length)
        image = (records.IMAGE, posteriors[number % len(posteriors)])
        writer.write(records.encode(records.Record((caption,), (image,)), ids))
    writer.close()


def disk_rate(directory: Path, record: int, seconds: float = 2.0) -> float:
    """Bytes per second of reading `record` bytes at random places, with `THREADS` threads."""
    files = [os.open(path, os.O_RDONLY) for path in sorted((directory / "shards").iterdir())]
    sizes = [os.fstat(file).st_size for file in files]

    def reading(seed: int) -> float:
        rng = np.random.default_rng(seed)
        done = 0
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            at = int(rng.integers(len(files)))
            done += len(os.pread(files[at], record, int(rng.integers(sizes[at] - record))))
        return done / (time.perf_counter() - begin)

    with ThreadPoolExecutor(THREADS) as executor:
        rate = sum(executor.map(reading, range(THREADS)))
    for file in files:
        os.close(file)
    return rate


def copy_rate(size: int) -> float:
    """Bytes per second of copying an array of `size` bytes."""
    source = np.ones(size, np.uint8)
    target = np.ones(size, np.uint8)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return size / float(np.median(times))


def resident() -> float:
    """MiB of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Reading:
    """What reading the rows took."""

    rows: int
    images: int
    row_bytes: float
    seconds: float
    processor_seconds: float
    warm_up: int
    """Batches read before measuring."""
    first_memory: float
    """MiB after the warm-up."""
    peak_memory: float
    """MiB, after any batch."""


def read_rows(data: Data, rows: int) -> Reading:
    """Reads whole batches of at most `rows` rows, after a warm-up."""
    config = data.experiment.data
    batches = read(data.batches(), 0, config.prefetch)
    warm_up = max(config.prefetch, 500 // config.batch_rows)
    for _ in range(warm_up):
        batch = next(batches)
    count = rows // config.batch_rows
    images = 0
    first = peak = resident()
    begin = time.perf_counter()
    begin_processor = time.process_time()
    for _ in range(count):
        batch = next(batches)
        images += int((batch.image_start_BM < config.row_length).sum())
        peak = max(peak, resident())
    seconds = time.perf_counter() - begin
    processor_seconds = time.process_time() - begin_processor
    row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / config.batch_rows
    return Reading(
        rows=count * config.batch_rows,
        images=images,
        row_bytes=row_bytes,
        seconds=seconds,
        processor_seconds=processor_seconds,
        warm_up=warm_up,
        first_memory=first,
        peak_memory=peak,
    )


def report(reading: Reading, record: int, disk: float, copy: float) -> None:
    """`record`: stored bytes of an image; `disk` and `copy`: bytes per second."""
    rate = reading.rows / reading.seconds
    per_row = reading.images / reading.rows
    processor = reading.processor_seconds / reading.rows
    stored = record * per_row
    limit = 1 / (stored / disk + reading.row_bytes / copy)
    grown = reading.peak_memory - reading.first_memory
    print(f"rows       {rate:,.0f} rows/s of 4,096 positions, {per_row:.1f} images each")
    print(f"processor  {processor * 1e3:.2f} ms per row, {processor * rate:.2f} cores busy")
    print(f"disk       {disk / 2**30:.2f} GiB/s at random, {stored / 2**20:.2f} MiB stored per row")
    print(f"copies     {copy / 2**30:.2f} GiB/s, {reading.row_bytes / 2**20:.2f} MiB per row")
    print(f"bound      {limit:,.0f} rows/s by disk and one copy; {rate / limit:.1%} of it reached")
    print(
        f"memory     {reading.peak_memory:,.0f} MiB at most over {reading.rows} rows, "
        f"{grown:+,.0f} MiB since batch {reading.warm_up}"
    )


def main() -> None:
    keep_freed_memory()
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        tokenizer = train_tokenizer(["synthetic text"], 300)
        write_dataset(Path(name), args.pairs, tokenizer)
        config = DataConfig(sources=(SourceConfig(name),), row_length=4096, batch_rows=args.batch)
        data = Data(Experiment(name="benchmark", image=IMAGE, data=config), tokenizer)
        reading = read_rows(data, args.rows)
        record = 2 * 2 * int(np.prod(IMAGE.shape))
        disk = disk_rate(Path(name), record)
    report(reading, record, disk, copy_rate(int(reading.row_bytes)))


if __name__ == "__main__":
    main()
