"""Speed and memory of reading packed rows as training does, against what this machine's disk and memory allow.

    python benchmarks/read_rows.py --rows 10000

A prepared data set of pairs is written to local disk first: posteriors of 32x32x8 latents in half precision, captions
of about thirty tokens. Rows of 4,096 positions in patches of 2x2 hold fourteen or fifteen images. The bound is the time
to read the stored bytes of a row from the same files, in random order and as warm, and to copy the row once.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from transfusion_jax.config import DataConfig, Experiment, ImageConfig, SourceConfig
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.sources import records
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.host import keep_freed_memory
from transfusion_jax.preparation.prepare import FORMAT

IMAGE = ImageConfig(32, 32, 8, 2)
THREADS = 4  # that `read` uses


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--pairs", type=int, default=32_768, help="documents on disk, 32 kB each")
    parser.add_argument(
        "--directory", type=Path, help="where they are written (the system's temporary directory)"
    )
    return parser.parse_args()


def write_dataset(directory: Path, pairs: int, tokenizer: Tokenizer) -> None:
    """A finished data set as `prepare` leaves it."""
    rng, ids = np.random.default_rng(0), records.id_type(tokenizer.size)
    lengths = np.clip(rng.lognormal(np.log(30), 0.5, pairs).astype(int), 1, 500)
    pool = np.abs(rng.standard_normal((64, 2, *IMAGE.shape), np.float32)).astype(np.float16)
    (directory / "shards").mkdir()
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    np.save(
        directory / "index.npy",
        np.stack([lengths, np.ones(pairs), np.zeros(pairs)]).astype(np.int32),
    )
    shards = []
    for shard in np.array_split(lengths, -(-pairs // 4096)):
        path = directory / "shards" / f"{len(shards):06}.arrayrecord"
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for number, length in enumerate(shard):
            caption = rng.integers(tokenizer.boi, size=length)
            writer.write(
                records.encode(
                    records.Record((caption,), ((records.IMAGE, pool[number % 64]),)), ids
                )
            )
        writer.close()
        shards.append({"name": path.name, "documents": len(shard), "bytes": path.stat().st_size})
    info = {
        "format": FORMAT,
        "images": pairs,
        "image": {"stored": "latents", "shape": IMAGE.shape, "shift": 0.1, "scale": 1.1},
        "tokenizer": {"entries": tokenizer.size},
        "shards": shards,
        "index_sha256": hashlib.sha256((directory / "index.npy").read_bytes()).hexdigest(),
    }
    (directory / "dataset.json").write_text(json.dumps(info))


def bound(
    directory: Path, row_bytes: float, record: int, seconds: float = 2.0
) -> tuple[float, float]:
    """Bytes/s of reading records at random with as many threads, and of copying a row."""
    files = [os.open(path, os.O_RDONLY) for path in sorted((directory / "shards").iterdir())]
    sizes = [os.fstat(file).st_size for file in files]

    def reading(seed: int) -> float:
        rng, done, begin = np.random.default_rng(seed), 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            at = int(rng.integers(len(files)))
            done += len(os.pread(files[at], record, int(rng.integers(sizes[at] - record))))
        return done / (time.perf_counter() - begin)

    with ThreadPoolExecutor(THREADS) as executor:
        read_rate = sum(executor.map(reading, range(THREADS)))
    for file in files:
        os.close(file)
    source, target, times = np.ones(int(row_bytes), np.uint8), np.ones(int(row_bytes), np.uint8), []
    for _ in range(200):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return read_rate, row_bytes / float(np.median(times))


def resident() -> float:
    """MiB of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    keep_freed_memory()
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        tokenizer = train_tokenizer(["synthetic text"], 300)
        write_dataset(Path(name), args.pairs, tokenizer)
        config = DataConfig(sources=(SourceConfig(name),), row_length=4096, batch_rows=args.batch)
        data = Data(Experiment(name="benchmark", image=IMAGE, data=config), tokenizer)
        batches = read(data.batches(), 0, config.prefetch)
        rows = args.rows // args.batch * args.batch
        warm = max(config.prefetch, 500 // args.batch)
        for _ in range(warm):
            batch = next(batches)
        before, peak, images = resident(), 0.0, 0
        begin, worked = time.perf_counter(), time.process_time()
        for _ in range(rows // args.batch):
            batch = next(batches)
            images += int((batch.image_start_BM < config.row_length).sum())
            peak = max(peak, resident())
        seconds, worked = time.perf_counter() - begin, time.process_time() - worked
        rate, per_row = rows / seconds, images / rows
        row_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / args.batch
        record = 2 * 2 * int(np.prod(IMAGE.shape))
        stored = record * per_row
        read_rate, copy_rate = bound(Path(name), row_bytes, record)
    limit = 1 / (stored / read_rate + row_bytes / copy_rate)
    print(f"rows       {rate:,.0f} rows/s of 4,096 positions, {per_row:.1f} images each")
    print(f"processor  {worked / rows * 1e3:.2f} ms for a row, {worked / seconds:.2f} cores busy")
    print(
        f"disk       {read_rate / 2**30:.2f} GiB/s at random, {stored / 2**20:.2f} MiB stored for a row"
    )
    print(f"copies     {copy_rate / 2**30:.2f} GiB/s, {row_bytes / 2**20:.2f} MiB in a row")
    print(f"bound      {limit:,.0f} rows/s by disk and one copy: {rate / limit:.1%} of it")
    print(
        f"memory     {peak:,.0f} MiB at most over {rows} rows, {peak - before:+,.0f} MiB since the first {warm}"
    )


if __name__ == "__main__":
    main()
