"""Writes the pictures and captions of the source `digits` as files, for `prepare` to read.

    python experiments/write_digits.py data/raw/digits

The 1,500 pictures of training alone, each with its four captions. experiments/table3_mini.py says
what comes next.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from transfusion_jax.data.sources.digits import captions, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with (out / "captions.jsonl").open("w") as lines:
        for number, (picture, label) in enumerate(zip(*load("train"), strict=True)):
            file = f"{number:04d}.png"
            grey = np.round((picture[:, :, 0] + 1) * 127.5).astype(np.uint8)
            Image.fromarray(grey).save(out / file)
            for caption in captions(label):
                lines.write(json.dumps({"file": file, "caption": caption}) + "\n")


if __name__ == "__main__":
    main()
