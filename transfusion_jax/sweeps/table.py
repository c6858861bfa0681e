"""One table over the points of a sweep: what varies, what it cost, what came out, what is
published."""

import csv
import io
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_jax.sweeps.points import Changes, Point, changes, varying, without_seed, written

COSTS = {
    "parameters": "parameters",
    "model_flops": "FLOPs",
    "tokens": "tokens",
    "train_seconds": "seconds",
}
"""What a run is and takes: key of summary.json -> heading."""
NO_METRICS = (*COSTS, "steps", "goodput", "likelihood_rows")
"""Numbers of summary.json that do not say how good a model is."""

Published = Mapping[str, Mapping[str, float]]
"""Name of a point -> metric -> published number."""
Columns = dict[str, list[Any]]
"""Heading -> a value for each line; None: there is none."""


@dataclass(frozen=True)
class Row:
    """A point in the table."""

    name: str
    status: str
    varying: Changes
    """All fields that vary over the sweep."""
    changes: Changes
    """Those that most points have otherwise."""
    summary: Mapping[str, Any]
    """Of a finished point; empty for others."""
    published: Mapping[str, float]
    group: str
    """The first of the points that differ from this one in `train.seed` only."""

    @property
    def metrics(self) -> dict[str, float]:
        return {
            name: value
            for name, value in self.summary.items()
            if isinstance(value, int | float) and name not in NO_METRICS
        }


def make_rows(points: Sequence[Point], published: Published) -> list[Row]:
    """The rows of all points, as their directories are now."""
    experiments = [point.as_run() for point in points]
    first: dict[Any, str] = {}
    rows = []
    for point, all_fields, changed in zip(
        points, varying(experiments), changes(experiments), strict=True
    ):
        rows.append(
            Row(
                point.name,
                status := point.status(),
                all_fields,
                changed,
                (point.summary() or {}) if status == "finished" else {},
                published.get(point.name, {}),
                first.setdefault(without_seed(point.experiment), point.name),
            )
        )
    return rows


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Metrics that a row has measured or published, in the order in which they come up."""
    rows = list(rows)
    ours = dict.fromkeys(name for row in rows for name in row.metrics)
    return list(ours | dict.fromkeys(name for row in rows for name in row.published))


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in their seed only, under the name of the first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def titles(groups: Iterable[Sequence[Row]]) -> list[str]:
    """A name for each group of points that differ in their seed only: what their names have in
    common, or the first of them where other groups have that in common as well."""
    groups = list(groups)
    shared = [_shared([row.name for row in rows]) for rows in groups]
    return [
        name if shared.count(name) == 1 else rows[0].name
        for name, rows in zip(shared, groups, strict=True)
    ]


def _shared(names: Sequence[str]) -> str:
    """What names begin with, or the first of them."""
    shared = os.path.commonprefix(names)
    if any(name[len(shared) :][:1].isdigit() for name in names):  # of 10 and 11 not the 1
        shared = shared.rstrip("0123456789")
    return shared.rstrip("_-. ") or names[0]


def as_csv(rows: Sequence[Row]) -> str:
    """All digits, and a column for each field that varies."""
    fields = {name: [row.varying[name] for row in rows] for name in rows[0].varying}
    costs = {key: [row.summary.get(key) for row in rows] for key in COSTS}
    columns = {**_heads(rows), **fields, **costs, **_metrics(rows)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def listed(file: Path) -> set[str]:
    """Names of the points in a table as CSV; none where no such table can be read."""
    if not file.is_file():
        return set()
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            return {line["point"] for line in csv.DictReader(opened) if line.get("point")}
    except (ValueError, csv.Error):
        return set()


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, and a second one with means and ranges where finished points differ in their seed
    only."""
    columns = {
        **_heads(rows),
        "changes": [written(row.changes) for row in rows],
        **{title: [row.summary.get(key) for row in rows] for key, title in COSTS.items()},
        **_metrics(rows),
    }
    found = groups([row for row in rows if row.summary])
    if all(len(alike) == 1 for alike in found.values()):
        return markdown(columns)
    return f"{markdown(columns)}\nMean (least to greatest) over seeds:\n\n{_over_seeds(found)}"


def _heads(rows: Sequence[Row]) -> Columns:
    return {"point": [row.name for row in rows], "status": [row.status for row in rows]}


def _metrics(rows: Sequence[Row]) -> Columns:
    """Each metric that was measured, with the published numbers in the column after it."""
    columns: Columns = {}
    for name in metric_names(rows):
        for title, values in (
            (name, [row.metrics.get(name) for row in rows]),
            (f"{name} (published)", [row.published.get(name) for row in rows]),
        ):
            if any(value is not None for value in values):
                columns[title] = values
    return columns


def _over_seeds(found: Mapping[str, Sequence[Row]]) -> str:
    columns: Columns = {
        "point": titles(found.values()),
        "seeds": [len(rows) for rows in found.values()],
    }
    for name in dict.fromkeys(
        name for rows in found.values() for row in rows for name in row.metrics
    ):
        columns[name] = [_spread(values_of(rows, name), len(rows)) for rows in found.values()]
    return markdown(columns)


def values_of(rows: Sequence[Row], metric: str) -> list[float]:
    """What the finished ones among the rows have measured; numbers that are not finite left out."""
    values = (row.metrics.get(metric, math.nan) for row in rows)
    return [value for value in values if math.isfinite(value)]


def _spread(values: Sequence[float], seeds: int) -> str | None:
    """Mean and range, and how many have a value where not all do."""
    if not values:
        return None
    ends = (statistics.fmean(values), min(values), max(values))
    text = "{} ({} to {})".format(*map(shown, ends)) if len(values) > 1 else shown(values[0])
    return text if len(values) == seeds else f"{text}, {len(values)} of {seeds}"


def markdown(columns: Columns) -> str:
    """A Markdown table whose columns are aligned in plain text as well."""
    cells = [
        [shown(value).replace("|", "\\|") for value in (title, *values)]
        for title, values in columns.items()
    ]
    widths = [max(map(len, column)) for column in cells]
    numeric = [
        any(isinstance(value, int | float) for value in values) for values in columns.values()
    ]
    rules = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    head, *body = (
        [f"{x:>{w}}" if n else f"{x:{w}}" for x, w, n in zip(line, widths, numeric, strict=True)]
        for line in zip(*cells, strict=True)
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rules, *body))


def shown(value: Any) -> str:
    """A value for people: four digits, thousands apart; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
