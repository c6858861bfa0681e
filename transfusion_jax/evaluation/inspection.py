"""What an experiment's data is: one packed row, drawn and in words, and totals over many."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, ImageConfig
from transfusion_jax.config.stored import differences
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.figures import INK, save, show, wrapped
from transfusion_jax.images import MODES
from transfusion_jax.model.attention.intervals import row_intervals
from transfusion_jax.pretraining.run import stored

COUNTED = 256  # rows of the totals
SHOWN = 32  # images of a row that are drawn


def check_run(experiment: Experiment, directory: Path) -> None:
    """Raises ValueError unless row i of `experiment` is row i of the run in `directory`."""
    earlier, _ = stored(directory, lambda line: None)
    if changed := differences(earlier, experiment):
        raise ValueError(
            f"the rows of {directory} are of another config; what differs: {'; '.join(changed)}"
        )


def inspect_row(data: Data, number: int, path: Path) -> str:
    """Draws row `number` of the run into `path`; returns it in words, a line for every document."""
    rows, experiment = data.rows(), data.experiment
    patches = experiment.model.mutual_patches(experiment.image)
    row, source = rows[number], data.sources[data.mixture[number][0]]
    intervals = row_intervals(jax.tree.map(jnp.asarray, stack([row])), patches)
    interval = np.asarray(intervals.k_start_BL[0]), np.asarray(intervals.k_end_BL[0])
    L, documents = len(row.tokens_BL), int(row.segment_BL.max())
    starts = row.image_start_BM[row.image_start_BM < L]
    latents = source.source.assets.latents
    pictures = list(row.latents_BMhwc[: min(len(starts), SHOWN)])
    if latents is not None:
        codec = load_codec(latents.directory)
        pictures = [codec.picture(x) for x in pictures]
    else:
        pictures = [_shown(x, experiment.image) for x in pictures]
    lines = [f"{i:4}  {_words(data, row, i)}" for i in range(1, documents + 1)]
    texts = [_text(data, row, int(row.segment_BL[start])) for start in starts[:SHOWN]]
    filled = float((row.segment_BL > 0).mean())
    title = (
        f"row {number}, from {source.name}: {documents} documents, {len(starts)} images, "
        f"{filled:.1%} filled"
    )
    if len(starts) > SHOWN:
        title += f"; the first {SHOWN} images are drawn, {len(starts) - SHOWN} more are not"
    row_picture(row, interval, experiment.image.patches, texts, pictures, title, path)
    return "\n".join([title, *lines])


def _shown(image_hwc: np.ndarray, image: ImageConfig) -> np.ndarray:
    """Pixels; of codes and latents that no autoencoder makes pictures of, something in grey."""
    if image.codes:
        return 2 * image_hwc / image.codes - 1
    return image_hwc if image.channels in MODES else image_hwc.mean(-1, keepdims=True)


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
    return " ".join(
        re.sub(r"\[image t < \d+\]|\(no text loss\)", "", _words(data, row, document)).split()
    )


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
    steps = data.experiment.train.steps
    epochs = data.epochs(steps)
    width = max(map(len, epochs))
    for name in counts:
        lines.append(
            f"  {name:{width}} {counts[name] / COUNTED:7.1%} of rows {text[name]:12,} text tokens "
            f"{image[name]:12,} patches"
        )
    for name, times in epochs.items():
        lines.append(f"  {name:{width}} read {times:.2f} times in {steps} steps")
    return "\n".join(lines)


def row_picture(
    row: Batch,
    interval: tuple[np.ndarray, np.ndarray],
    patches: int,
    texts: Sequence[str],
    pictures: Sequence[np.ndarray],
    title: str,
    path: Path,
) -> None:
    """One packed row (a `Batch` without its leading dimension).

    Left, the interval mask, query i down and keys [start, end) across. Right, the row's positions
    in reading order, coloured by document, patches darker, padding white, and below where text is
    learned. Under both, the images with the text of their documents and their noise limits.
    `interval` holds k_start [L] and k_end [L]; an image takes so many `patches`.
    """
    lines = max(-(-len(pictures) // 8), 1)
    below = max(3.8, 1.9 * lines)  # inches
    figure = plt.figure(figsize=(13, 5.2 + below), layout="constrained")
    figure.suptitle(title, color=INK)
    grid = figure.add_gridspec(3, 2, height_ratios=(2 * 5.2 / 3, 5.2 / 3, below))
    _draw_mask(figure.add_subplot(grid[:2, 0]), row, interval)
    positions = figure.add_subplot(grid[0, 1])
    _draw_documents(positions, row, patches)
    _draw_learned(figure.add_subplot(grid[1, 1], sharex=positions), row)
    images = figure.add_subfigure(grid[2, :])
    for number, axes in enumerate(images.subplots(lines, 8).flat):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if number < len(pictures):
            show(axes, pictures[number])
            caption = f"{wrapped(texts[number], 26, 3)}\nt < {int(row.image_limit_BM[number])}"
            axes.set_xlabel(caption, fontsize=6.5, color=INK)
    save(figure, path, 110)


_COLOURS = ListedColormap(["white", *plt.get_cmap("tab10").colors[:9]])
_DOCUMENTS = {"cmap": _COLOURS, "vmin": 0, "vmax": 9, "interpolation": "nearest"}


def _draw_mask(axes: plt.Axes, row: Batch, interval: tuple[np.ndarray, np.ndarray]) -> None:
    keys = np.arange(len(row.tokens_BL))
    mask = (keys >= interval[0][:, None]) & (keys < interval[1][:, None])
    axes.imshow(mask * (1 + row.segment_BL[:, None] % 9), **_DOCUMENTS)
    axes.set(title="who sees whom", xlabel="keys", ylabel="queries")


def _draw_documents(axes: plt.Axes, row: Batch, patches: int) -> None:
    of_images = np.zeros(len(row.tokens_BL))
    for start in row.image_start_BM[row.image_start_BM < len(of_images)]:
        of_images[start : start + patches] = 1
    shade = np.where(row.segment_BL > 0, 1 + row.segment_BL % 9, 0)
    axes.imshow(_lines(shade), aspect="auto", **_DOCUMENTS)
    axes.imshow(_lines(of_images), cmap="gray_r", alpha=0.45 * _lines(of_images), aspect="auto")
    axes.set(title="documents (patches darker)", yticks=[])


def _draw_learned(axes: plt.Axes, row: Batch) -> None:
    axes.imshow(
        _lines(row.text_weight_BL),
        cmap="Greys",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    axes.set(title="text under the loss", yticks=[], xlabel="position, line by line")


def _lines(values: np.ndarray) -> np.ndarray:
    """A row of values as lines of a block about as wide as twice its height."""
    width = -(-int(np.sqrt(2 * len(values))) // 8) * 8
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)
