"""Data to look at: a contact sheet of what was prepared, and a packed row drawn as a person would want to see it."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

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
        axes.set_xlabel(_wrapped(caption, 24, 4), fontsize=6.5, color=INK)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(axes: plt.Axes, picture: np.ndarray) -> None:
    """A picture in [-1, 1]; one channel is drawn as grey."""
    axes.imshow(to_uint8(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _wrapped(text: str, width: int, lines: int) -> str:
    """At most so many lines of so many characters; mathematics and what fonts lack is left to show as it is."""
    kept = textwrap.wrap(" ".join(text.split()), width)[: lines + 1]
    if len(kept) > lines:
        kept = [*kept[: lines - 1], kept[lines - 1][: width - 1] + "…"]
    return "\n".join(kept).replace("$", r"\$")
