"""Speed of `prepare` against Pillow alone, on the same pictures, cores and number of workers.

    python benchmarks/prepare.py --pictures 400

Photograph-like JPEGs are made in a temporary directory. Pillow alone decodes each, crops its centre and resizes it as
`prepare` does, and keeps nothing. `prepare` also reads captions, makes tokens, and writes shards, checksums and ledger.
Both are measured in turns in one process, and the medians compared; the tokenizer is given.
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
        "--copies", type=int, default=8, help="of each; they are links to the same files"
    )
    parser.add_argument(
        "--width", type=int, default=512, help="of the JPEGs; their height is three quarters of it"
    )
    parser.add_argument("--size", type=int, default=256, help="of the prepared pictures")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def make_pictures(folder: Path, count: int, copies: int, width: int) -> None:
    """Smooth shapes at several scales, with the noise of a sensor: JPEGs of about 1.5 bits a pixel."""
    rng, captions = np.random.default_rng(0), []
    size = (width, 3 * width // 4)
    for number in range(count):
        total = rng.normal(128, 4, (size[1], size[0], 3))
        for cells in (3, 10, 40):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            total += (
                np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32) - 128
            ) / cells**0.5
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(
            folder / f"{number}.jpg", quality=90
        )
        for copy in range(copies):
            name = f"{number}_{copy}.jpg"
            os.link(folder / f"{number}.jpg", folder / name)
            captions.append(
                json.dumps({"file": name, "caption": f"a photograph of things, number {number}"})
            )
    (folder / "captions.jsonl").write_text("\n".join(captions))


def with_pillow(path: Path, size: int) -> None:
    with Image.open(path) as picture:
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        picture.convert("RGB").resize(
            (size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0
        )


def main() -> None:
    keep_freed_memory()
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        (photos := Path(name) / "photos").mkdir()
        make_pictures(photos, args.pictures, args.copies, args.width)
        (model := Path(name) / "tokenizer.model").write_bytes(
            train_tokenizer(["a photograph of things"], 300).model
        )
        paths = sorted(photos.glob("*_*.jpg"))
        settings = Preparation(
            (str(photos),), height=args.size, width=args.size, tokenizer=str(model)
        )
        rounds = []
        for number in range(args.rounds):
            clocks = [time.perf_counter()]
            with ThreadPoolExecutor(args.workers) as executor:
                list(executor.map(lambda path: with_pillow(path, args.size), paths))
            clocks.append(time.perf_counter())
            prepare(
                settings, Path(name) / f"out{number}", None, False, args.workers, lambda line: None
            )
            clocks.append(time.perf_counter())
            rounds.append(np.diff(clocks) / len(paths))
        size = np.mean([path.stat().st_size for path in paths])
    rounds = np.asarray(rounds)  # [round, what], seconds of a picture
    print(
        f"{len(paths):,} JPEGs of {args.width}x{3 * args.width // 4}, {size / 1e3:.0f} kB each, to {args.size} pixels"
    )
    alone, prepared = 1 / np.median(rounds, axis=0)
    print(f"Pillow alone  {alone:6,.0f} pictures/s on {args.workers} threads")
    print(f"prepare       {prepared:6,.0f} pictures/s on {args.workers} processes")
    ratios = rounds[:, 0] / rounds[:, 1]
    print(f"ratio         {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
