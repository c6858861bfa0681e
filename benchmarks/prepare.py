"""Speed of `prepare` against Pillow alone, with the same pictures and number of workers.

    python benchmarks/prepare.py --pictures 400

JPEGs that resemble photographs are made in a temporary directory. Pillow alone decodes each, crops
its centre and resizes it as `prepare` does, and keeps nothing. `prepare` also reads captions,
tokenises them, and writes shards, checksums and the ledger. The two are timed alternately; medians
are compared. Training a tokenizer is not timed.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.host import keep_freed_memory
from transfusion_jax.preparation.prepare import Preparation, prepare


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument(
        "--copies", type=int, default=8, help="hard links to each picture, read as separate items"
    )
    parser.add_argument(
        "--width", type=int, default=512, help="width of the JPEGs; the height is 3/4 of it"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the prepared pictures")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def make_pictures(folder: Path, count: int, copies: int, width: int) -> None:
    """JPEGs of about 1.5 bits per pixel: smooth shapes at several scales with sensor noise."""
    rng = np.random.default_rng(0)
    captions = []
    size = (width, 3 * width // 4)
    for number in range(count):
        total = rng.normal(128, 4, (size[1], size[0], 3))
        for cells in (3, 10, 40):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32)
            total += (smooth - 128) / cells**0.5
        picture = folder / f"{number}.jpg"
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(picture, quality=90)
        for copy in range(copies):
            name = f"{number}_{copy}.jpg"
            os.link(picture, folder / name)
            line = {"file": name, "caption": f"a photograph of things, number {number}"}
            captions.append(json.dumps(line))
        picture.unlink()
    (folder / "captions.jsonl").write_text("\n".join(captions))


def with_pillow(path: Path, size: int) -> None:
    """Decodes, crops and resizes a picture as `prepare` does."""
    with Image.open(path) as picture:
        side = min(picture.size)
        left = (picture.width - side) / 2
        top = (picture.height - side) / 2
        picture.convert("RGB").resize(
            (size, size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,
        )


def seconds_per_picture(args: argparse.Namespace, folder: Path) -> np.ndarray:
    """Seconds per picture of Pillow alone and of `prepare`, [rounds, 2]."""
    photos = folder / "photos"
    paths = sorted(photos.glob("*_*.jpg"))
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(["a photograph of things"], 300).model)
    settings = Preparation((str(photos),), height=args.size, width=args.size, tokenizer=str(model))
    rounds = []
    for number in range(args.rounds):
        begin = time.perf_counter()
        with ThreadPoolExecutor(args.workers) as executor:
            list(executor.map(lambda path: with_pillow(path, args.size), paths))
        between = time.perf_counter()
        out = folder / f"out{number}"
        prepare(settings, out, None, False, args.workers, lambda line: None)
        rounds.append((between - begin, time.perf_counter() - between))
    return np.asarray(rounds) / len(paths)


def main() -> None:
    keep_freed_memory()
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        make_pictures(photos, args.pictures, args.copies, args.width)
        rounds = seconds_per_picture(args, Path(name))
        sizes = [path.stat().st_size for path in photos.glob("*_*.jpg")]
    print(
        f"{len(sizes):,} JPEGs of {args.width}x{3 * args.width // 4}, "
        f"{np.mean(sizes) / 1e3:.0f} kB each, to {args.size} pixels"
    )
    alone, prepared = 1 / np.median(rounds, axis=0)
    print(f"Pillow alone  {alone:6,.0f} pictures/s on {args.workers} threads")
    print(f"prepare       {prepared:6,.0f} pictures/s on {args.workers} processes")
    ratios = rounds[:, 0] / rounds[:, 1]
    print(f"ratio         {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
