"""What an experiment's data is: one packed row, drawn and in words, and totals over many."""

import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.data.figures import row_picture
from transfusion_jax.data.look import to_picture
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.data.prepared import Prepared
from transfusion_jax.model.attention.intervals import row_intervals

COUNTED = 256  # rows of the totals


def inspect_row(data: Data, number: int, path: Path) -> str:
    """Draws row `number` of the run into `path`; returns it in words, a line for every document."""
    rows, image = data.rows(), data.experiment.image
    row, source = rows[number], data.sources[data.mixture[number][0]]
    intervals = row_intervals(jax.tree.map(jnp.asarray, stack([row])), image.patches)
    interval = np.asarray(intervals.k_start_BL[0]), np.asarray(intervals.k_end_BL[0])
    L, documents = len(row.tokens_BL), int(row.segment_BL.max())
    starts = row.image_start_BM[row.image_start_BM < L]
    picture = to_picture(source.source.dataset) if isinstance(source.source, Prepared) else lambda x: x
    lines = [f"{i:4}  {_words(data, row, i)}" for i in range(1, documents + 1)]
    texts = [_text(data, row, int(row.segment_BL[start])) for start in starts]
    filled = float((row.segment_BL > 0).mean())
    title = f"row {number}, from {source.name}: {documents} documents, {len(starts)} images, {filled:.1%} filled"
    row_picture(row, interval, texts, [picture(x) for x in row.latents_BMhwc[: len(starts)]], title, path)
    return "\n".join([title, *lines])


def _words(data: Data, row: Batch, document: int) -> str:
    """A document of a row: its text, and `[image t < limit]` where an image is."""
    at = np.flatnonzero(row.segment_BL == document)
    parts, begin = [], int(at[0])
    for slot, start in enumerate(row.image_start_BM):
        if at[0] <= start <= at[-1]:
            parts += [
                data.tokenizer.decode(row.tokens_BL[begin : start - 1]),
                f"[image t < {row.image_limit_BM[slot]}]",
            ]
            begin = int(start) + data.experiment.image.patches + 1
    parts.append(data.tokenizer.decode(row.tokens_BL[begin : at[-1] + 1]))
    learned = "" if row.text_weight_BL[at].any() else "  (no text loss)"
    return " ".join(part for part in parts if part) + learned


def _text(data: Data, row: Batch, document: int) -> str:
    return " ".join(re.sub(r"\[image t < \d+\]|\(no text loss\)", "", _words(data, row, document)).split())


def totals(data: Data) -> str:
    """Over the first rows of the run: how full they are, tokens by source, images in a row."""
    rows, patches = data.rows(), data.experiment.image.patches
    text, image, counts, images, filled = Counter(), Counter(), Counter(), [], []
    for number in range(COUNTED):
        row, name = rows[number], data.sources[data.mixture[number][0]].name
        here = int((row.image_start_BM < len(row.tokens_BL)).sum())
        counts[name] += 1
        image[name] += here * patches
        text[name] += int((row.segment_BL > 0).sum()) - here * patches
        images.append(here)
        filled.append((row.segment_BL > 0).mean())
    lines = [
        f"first {COUNTED} rows of {data.experiment.data.row_length}: {np.mean(filled):.1%} filled, "
        f"{np.mean(images):.1f} images in a row ({min(images)} to {max(images)})"
    ]
    for name in counts:
        lines.append(
            f"  {name:24}{counts[name] / COUNTED:7.1%} of rows {text[name]:12,} text tokens {image[name]:12,} patches"
        )
    for name, epochs in data.epochs(data.experiment.train.steps).items():
        lines.append(f"  {name:24}read {epochs:.2f} times in {data.experiment.train.steps} steps")
    return "\n".join(lines)
