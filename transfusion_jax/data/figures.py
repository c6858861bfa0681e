"""Data to look at: a contact sheet of what was prepared, and a packed row drawn as a person would want to see it."""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from transfusion_jax.batch import Batch
from transfusion_jax.data.images import to_uint8

INK, MUTED = "#1f2430", "#8a8f98"

ToPicture = Callable[[np.ndarray], np.ndarray]
"""An image of the model's, float32 [h, w, c], to a picture in [-1, 1] with 1 or 3 channels."""


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path) -> None:
    """Pictures in [-1, 1] in a grid, each over its caption."""
    columns = min(8, max(len(pictures), 1))
    rows = -(-max(len(pictures), 1) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.3 * rows + 0.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title, color=INK, fontsize=11)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, picture, caption in zip(grid.flat, pictures, captions, strict=False):
        show(axes, picture)
        axes.set_xlabel(wrapped(caption, 24, 4), fontsize=6.5, color=INK)
    save(figure, path, 110)


def save(figure: plt.Figure, path: Path, dpi: int) -> None:
    """Writes a figure; letters that the font lacks are drawn as boxes, without a warning each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)


def show(axes: plt.Axes, picture: np.ndarray) -> None:
    """A picture in [-1, 1]; one channel is drawn as grey."""
    axes.imshow(to_uint8(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def wrapped(text: str, width: int, lines: int) -> str:
    """At most so many lines of so many characters; mathematics and what fonts lack is left to show as it is."""
    kept = textwrap.wrap(" ".join(text.split()), width)[: lines + 1]
    if len(kept) > lines:
        kept = [*kept[: lines - 1], kept[lines - 1][: width - 1] + "…"]
    return "\n".join(kept).replace("$", r"\$")


def row_picture(
    row: Batch, interval: tuple[np.ndarray, np.ndarray], texts: Sequence[str], pictures: Sequence[np.ndarray],
    title: str, path: Path,
) -> None:  # fmt: skip
    """One packed row (a `Batch` without its leading dimension).

    Left, the interval mask, query i down and keys [start, end) across. Right, the row's positions in reading order,
    coloured by document, patches darker, padding white, and below where text is learned. Under both, the images with
    the text of their documents and their noise limits. `interval` holds k_start [L] and k_end [L].
    """
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(title, color=INK)
    grid = figure.add_gridspec(3, 2, height_ratios=(2, 1, 2.2))
    keys = np.arange(len(row.tokens_BL))
    mask = (keys >= interval[0][:, None]) & (keys < interval[1][:, None])
    axes = figure.add_subplot(grid[:2, 0])
    axes.imshow(mask * (1 + row.segment_BL[:, None] % 9), cmap=_COLOURS, vmin=0, vmax=9, interpolation="nearest")
    axes.set(title="who sees whom", xlabel="keys", ylabel="queries")

    patches = np.zeros(len(keys), bool)
    for start in row.image_start_BM[row.image_start_BM < len(keys)]:
        patches[start : interval[1][start]] = True
    shade = np.where(row.segment_BL > 0, 1 + row.segment_BL % 9, 0)
    positions = figure.add_subplot(grid[0, 1])
    positions.imshow(_lines(shade), cmap=_COLOURS, vmin=0, vmax=9, interpolation="nearest", aspect="auto")
    positions.imshow(_lines(patches * 1.0), cmap="gray_r", alpha=0.45 * _lines(patches * 1.0), aspect="auto")
    positions.set(title="documents (patches darker)", yticks=[])
    learned = figure.add_subplot(grid[1, 1], sharex=positions)
    learned.imshow(_lines(row.text_weight_BL), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    learned.set(title="text under the loss", yticks=[], xlabel="position, line by line")

    below = figure.add_subfigure(grid[2, :])
    for number, axes in enumerate(below.subplots(max(-(-len(pictures) // 8), 1), 8).flat):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if number < len(pictures):
            show(axes, pictures[number])
            limit = int(row.image_limit_BM[number])
            axes.set_xlabel(f"{wrapped(texts[number], 26, 3)}\nt < {limit}", fontsize=6.5, color=INK)
    save(figure, path, 110)


_COLOURS = ListedColormap(["white", *plt.get_cmap("tab10").colors[:9]])


def _lines(values: np.ndarray) -> np.ndarray:
    """A row of values as lines of a block about as wide as twice its height."""
    width = -(-int(np.sqrt(2 * len(values))) // 8) * 8
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)
