"""The metrics of a sweep as a picture: a panel for each, over points, or over FLOPs where these
vary."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.figures import ACCENT, INK, MUTED, save
from transfusion_jax.sweeps.table import Row, groups, metric_names, titles, values_of

ACROSS = 4
"""Panels beside each other."""
PANELS, POINTS = 40, 100
"""At most so many metrics are drawn, and of so many points; a picture of more takes minutes, and
cannot be read."""
FLOPS_VARY = 1.5
"""From this ratio of most to least FLOPs on, metrics are drawn over FLOPs."""

PUBLISHED = {
    "linestyle": "",
    "marker": "D",
    "color": ACCENT,
    "markerfacecolor": "white",
    "markersize": 5,
}
"""How what is published is marked in a panel over points."""

Group = tuple[str, Sequence[Row]]
"""Rows that differ in their seed only, and their title."""


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draws what is measured and published; False if there is nothing yet, or are too many points.

    A metric that all points have in common has no panel. Points that differ in their seed only are
    one mark, at their mean, on a line from the least to the greatest.
    """
    members = groups(rows).values()
    found = list(zip(titles(members), members, strict=True))
    over_flops = _flops_vary(found)
    names = [
        name
        for name in metric_names(rows)
        if (any(values_of(alike, name) for _, alike in found) or not over_flops)
        and _differs(rows, name)
    ][:PANELS]
    if not names or len(found) > POINTS:
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
        axes.tick_params(which="both", labelsize=7, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    _legend(figure, found, over_flops, any(set(row.published) & set(names) for row in rows))
    save(figure, path, 150)
    return True


def _differs(rows: Sequence[Row], metric: str) -> bool:
    measured = values_of(rows, metric)
    return len(rows) == 1 or len(measured) < 2 or len(set(measured)) > 1


def _flops(rows: Sequence[Row]) -> float | None:
    found = (row.summary.get("model_flops") for row in rows)
    values = [value for value in found if isinstance(value, int | float) and value]
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
            axes.plot(value, y, **PUBLISHED)
        if values := values_of(rows, metric):
            mean = float(np.mean(values))
            axes.plot([min(values), max(values)], [y, y], color=INK, linewidth=1.4)
            axes.plot(mean, y, "o", color=INK, markersize=5)
            axes.annotate(
                f"{mean:.3g}",
                (mean, y),
                (0, 4),  # above the mark
                textcoords="offset points",
                fontsize=6.5,
                ha="center",
                color=INK,
            )
    axes.set(yticks=range(len(found)), yticklabels=[_plain(name) for name, _ in found])
    axes.set_ylim(len(found) - 0.4, -0.8)
    axes.margins(x=0.15)


def _over_flops(axes: plt.Axes, found: Sequence[Group], metric: str) -> None:
    """A mark of its own for each point; what is published has the same one, hollow."""
    for place, (_, rows) in enumerate(found):
        x, marker = _flops(rows), _marker(place)
        if x is None:
            continue
        for value in _published(rows, metric):
            axes.plot(x, value, **marker | {"markerfacecolor": "white"})
        if values := values_of(rows, metric):
            axes.plot([x, x], [min(values), max(values)], color=marker["color"], linewidth=1.2)
            axes.plot(x, float(np.mean(values)), **marker)
    every = [x for _, rows in found if (x := _flops(rows))]
    ticks = np.geomspace(min(every), max(every), 3)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:.1e}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("model FLOPs of training", fontsize=7, color=INK)
    axes.margins(0.1)


def _marker(place: int) -> dict:
    """Colour and shape of a point, by its place in the sweep; 70 differ."""
    return {
        "linestyle": "",
        "marker": "osD^vPX"[place % 7],
        "color": f"C{place % 10}",
        "markersize": 6,
    }


def _legend(figure: plt.Figure, found: Sequence[Group], over_flops: bool, published: bool) -> None:
    """What the marks are, where there are several kinds."""
    if over_flops:
        marks = {name: _marker(place) for place, (name, rows) in enumerate(found) if _flops(rows)}
        if published:
            marks["published"] = PUBLISHED | {"marker": "o", "color": MUTED}
    elif published:
        marks = {"measured": {**PUBLISHED, "marker": "o", "color": INK, "markerfacecolor": INK}}
        marks["published"] = PUBLISHED
    else:
        return
    handles = [plt.Line2D([], [], label=_plain(name), **mark) for name, mark in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _plain(name: str) -> str:
    """A name whose dollar signs are not read as maths."""
    return name.replace("$", r"\$")
