"""What people would rather look at than read: sample grids and loss curves, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data import digits as digits_data
from transfusion_jax.data.figures import save, show, wrapped
from transfusion_jax.data.images import to_uint8
from transfusion_jax.evaluation.digits import Drawn, Read
from transfusion_jax.training.metrics import read_metrics

INK, MUTED, ACCENT = "#1f2430", "#8a8f98", "#b3202c"


def digits_grid(drawn: Drawn, captions: Read, path: Path) -> None:
    """Left, ten drawings of every digit; right, held-out pictures with the captions written for them."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left.suptitle("drawn from a caption", color=INK)
    for label, row in enumerate(left.subplots(10, 10)):
        for column, axes in enumerate(row):
            index = label + 10 * column
            wrong = drawn.judged[index] != label
            _show(axes, drawn.images[index], frame=ACCENT if wrong else None)
        row[0].set_ylabel(digits_data.NUMBERS[label], rotation=0, ha="right", va="center", fontsize=9, color=INK)
    right.suptitle("held-out pictures, captions written by the model", color=INK)
    for index, axes in enumerate(right.subplots(6, 4).flat):
        correct = digits_data.label_of(captions.captions[index]) == captions.labels[index]
        _show(axes, captions.images[index])
        axes.set_title(captions.captions[index] or "(no caption)", fontsize=6, color=INK if correct else ACCENT)
    save(figure, path, 150)


def pairs_grid(
    captions: Sequence[str], drawn: Sequence[np.ndarray | None], images: Sequence[np.ndarray], told: Sequence[str],
    path: Path,
) -> None:  # fmt: skip
    """Left, what was drawn from held-out captions; right, held-out pictures with what was written about them."""
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    titles = ("drawn from held-out captions", "held-out pictures, captions written by the model")
    columns = zip(figure.subfigures(1, 2), titles, (drawn, images), (captions, told), strict=True)
    for part, title, pictures, texts in columns:
        part.suptitle(title, color=INK)
        for axes in (grid := part.subplots(4, 4)).flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, picture, text in zip(grid.flat, pictures, texts, strict=False):
            if picture is not None:
                show(axes, picture)
            axes.set_xlabel(wrapped(text or "(no caption)", 28, 3), fontsize=7, color=INK)
    save(figure, path, 120)


def curves(run_dir: Path, path: Path) -> None:
    """Text and image loss over the steps, smoothed line over the raw one."""
    rows = read_metrics(run_dir)
    steps = np.asarray([row["step"] for row in rows])
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, name, title in zip(
        panels, ("text_loss", "image_loss"), ("text (nats)", "image (MSE of noise)"), strict=True
    ):
        values = np.asarray([row[name] for row in rows], float)
        axes.plot(steps, values, color=MUTED, linewidth=0.6, alpha=0.6)
        axes.plot(steps, _smooth(values), color=INK, linewidth=1.6)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, 150)


def _show(axes: plt.Axes, image: np.ndarray | None, frame: str | None = None) -> None:
    if image is not None:
        axes.imshow(to_uint8(image), cmap="gray_r", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame or INK, linewidth=1.5)


def _smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Mean over a centred window of a share of the points."""
    half = max(int(len(values) * share), 1)
    return np.asarray([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])
