"""The metrics of a sweep as a picture: a panel for each, over points, or over FLOPs where these
vary."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.figures import ACCENT, INK, MUTED, save
from transfusion_jax.sweeps.table import Row, groups, metric_names, values_of

ACROSS = 4
"""Panels beside each other."""
FLOPS_VARY = 1.5
"""From this ratio of most to least FLOPs on, metrics are drawn over FLOPs."""

Group = tuple[str, Sequence[Row]]
"""Rows that differ in their seed only, and the name of the first."""


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draws what is measured and published; False if there is nothing yet.

    Points that differ in their seed only are one mark, at their mean, on a line from the least to
    the greatest.
    """
    found = list(groups(rows).items())
    over_flops = _flops_vary(found)
    names = [
        name
        for name in metric_names(rows)
        if any(values_of(members, name) for _, members in found) or not over_flops
    ]
    if not names:
        return False
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    height = 2.7 if over_flops else 0.75 + 0.3 * len(found)
    figure, panels = plt.subplots(
        down,
        across,
        figsize=(2.2 + 2.4 * across, 0.5 + height * down),
        layout="constrained",
        squeeze=False,
        sharey=not over_flops,
    )
    for axes, name in zip(panels.flat, names, strict=False):
        _over_flops(axes, found, name) if over_flops else _over_points(axes, found, name)
        axes.set_title(name, fontsize=9, color=INK)
        axes.tick_params(labelsize=7, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    _legend(figure, rows)
    save(figure, path, 150)
    return True


def _flops(rows: Sequence[Row]) -> float | None:
    values = [row.summary["model_flops"] for row in rows if row.summary.get("model_flops")]
    return float(np.mean(values)) if values else None


def _flops_vary(found: Sequence[Group]) -> bool:
    counts = [count for _, rows in found if (count := _flops(rows))]
    return len(counts) > 1 and max(counts) > FLOPS_VARY * min(counts)


def _published(rows: Sequence[Row], metric: str) -> list[float]:
    return [row.published[metric] for row in rows if metric in row.published][:1]


def _over_points(axes: plt.Axes, found: Sequence[Group], metric: str) -> None:
    """A line for each point, the first on top."""
    for y, (_, rows) in enumerate(found):
        axes.axhline(y, color=MUTED, linewidth=0.4, alpha=0.5, zorder=0)
        for value in _published(rows, metric):
            _mark_published(axes, value, y)
        if values := values_of(rows, metric):
            mean = float(np.mean(values))
            axes.plot([min(values), max(values)], [y, y], color=INK, linewidth=1.4)
            axes.plot(mean, y, "o", color=INK, markersize=5)
            _label(axes, f"{mean:.3g}", mean, y)
    axes.set(yticks=range(len(found)), yticklabels=[name for name, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.8)
    axes.margins(x=0.15)


def _over_flops(axes: plt.Axes, found: Sequence[Group], metric: str) -> None:
    for name, rows in found:
        x = _flops(rows)
        if x is None:
            continue
        for value in _published(rows, metric):
            _mark_published(axes, x, value)
        if values := values_of(rows, metric):
            mean = float(np.mean(values))
            axes.plot([x, x], [min(values), max(values)], color=INK, linewidth=1.4)
            axes.plot(x, mean, "o", color=INK, markersize=5)
            _label(axes, name, x, mean)
    axes.set_xscale("log")
    axes.set_xlabel("model FLOPs of training", fontsize=7, color=INK)
    axes.margins(0.2)


def _label(axes: plt.Axes, text: str, x: float, y: float) -> None:
    """Above a mark."""
    axes.annotate(
        text.replace("$", r"\$"),
        (x, y),
        (0, 4),
        textcoords="offset points",
        fontsize=6.5,
        ha="center",
        color=INK,
    )


def _mark_published(axes: plt.Axes, x: float, y: float) -> None:
    axes.plot(x, y, "D", markerfacecolor="white", markeredgecolor=ACCENT, markersize=5)


def _legend(figure: plt.Figure, rows: Sequence[Row]) -> None:
    """What the marks are, where there are two kinds."""
    if any(row.published for row in rows):
        handles = [
            plt.Line2D([], [], linestyle="", marker="o", color=INK, label="measured"),
            plt.Line2D(
                [],
                [],
                linestyle="",
                marker="D",
                markerfacecolor="white",
                markeredgecolor=ACCENT,
                label="published",
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
