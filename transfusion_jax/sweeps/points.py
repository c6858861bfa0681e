"""The points of a sweep: their directories, which of them are asked for, what each changes."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfusion_jax.config import Experiment
from transfusion_jax.config.fields import flattened
from transfusion_jax.config.stored import loads
from transfusion_jax.errors import require
from transfusion_jax.training.owner import CONFIG, SUMMARY, check_owner

TABLE = ("table.md", "table.csv", "table.png")
"""What a sweep leaves beside its points."""
Changes = dict[str, Any]
"""Values of fields by dotted name; None for a field that a point lacks, such as a second source."""


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep, and where it is run."""

    experiment: Experiment
    directory: Path

    @property
    def name(self) -> str:
        return self.experiment.name

    def summary(self) -> dict[str, Any] | None:
        """The numbers of the finished run; None where it is not finished, or was sampled or
        measured otherwise."""
        file = self.directory / SUMMARY
        if not file.exists():
            return None
        ran, asked = self._stored(), self.experiment
        if (ran.sampler, ran.evaluation) != (asked.sampler, asked.evaluation):
            return None
        try:
            summary = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        require(isinstance(summary, dict) and summary, f"{file} holds no numbers of a run")
        return summary

    def trouble(self) -> str:
        """Why what its directory holds is not a run of this point; empty where it is one."""
        try:
            check_owner(self.experiment, self.directory)
            self.summary()
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    def ran_otherwise(self) -> str:
        """Why a run that has just ended well is not that of this point; empty where it is."""
        if trouble := self.trouble():
            return trouble
        ran, asked = self._stored(), self.experiment
        same = (ran.sampler, ran.evaluation) == (asked.sampler, asked.evaluation)
        return "" if same else f"{self.directory} was measured with another sampler or other suites"

    def as_run(self) -> Experiment:
        """The experiment as its finished run has it: fields that a resumed run may change can
        differ. As asked for, where it is not finished."""
        if self.trouble() or self.summary() is None:
            return self.experiment
        return self._stored()

    def _stored(self) -> Experiment:
        """The experiment that its directory holds a run of."""
        config = self.directory / CONFIG
        return loads(config.read_bytes(), str(config))

    def status(self) -> str:
        if self.trouble():
            return "unusable"
        if self.summary() is not None:
            return "finished"
        return "not finished" if (self.directory / CONFIG).exists() else "not run"


def make_points(experiments: Sequence[Experiment], directory: Path) -> list[Point]:
    """The points, each in a folder of `directory` that has its name.

    Raises:
      ValueError: a name cannot be that of a folder.
    """
    for name in (experiment.name for experiment in experiments):
        is_folder = name == Path(name).name and name not in ("", "..")
        require(is_folder, f"a point cannot be called {name!r}: its run is a folder of that name")
        require(":" not in name, f"a point cannot be called {name!r}: it is run as FILE:NAME")
        plain = name.isprintable() and not name.startswith("-") and name not in (*TABLE, CONFIG)
        require(plain, f"a point cannot be called {name!r}: it is a file, a flag, or not one line")
    return [Point(experiment, directory / experiment.name) for experiment in experiments]


def chosen(points: Sequence[Point], only: Sequence[str] | None, index: int | None) -> list[Point]:
    """The points with these names (None: all), or the one at an index.

    Raises:
      ValueError: there is none of that name or index.
    """
    if index is not None:
        require(
            0 <= index < len(points),
            f"--index {index} must be in 0..{len(points) - 1}: there are {len(points)} points",
        )
        return [points[index]]
    names = [point.name for point in points]
    for name in only or ():
        require(name in names, f"--only: there is no point {name!r}, only {', '.join(names)}")
    return [point for point in points if only is None or point.name in only]


def check_runs(points: Sequence[Point], asked: Sequence[Point], directory: Path) -> None:
    """Raises ValueError if the sweep's directory is that of a run, a point's directory holds
    anything but a run of its config, or the numbers of a point that is asked for are damaged."""
    require(
        not (directory / CONFIG).exists(),
        f"{directory} holds a run; name another directory for the sweep with --out",
    )
    for point in points:
        check_owner(point.experiment, point.directory)
    for point in asked:
        point.summary()


def varying(experiments: Sequence[Experiment]) -> list[Changes]:
    """For each point, its values of all fields that are not the same in all; names do not count."""
    flat = [flattened(experiment) for experiment in experiments]
    names = dict.fromkeys(name for fields in flat for name in fields if name != "name")
    kept = [name for name in names if len({repr(fields.get(name)) for fields in flat}) > 1]
    return [{name: fields.get(name) for name in kept} for fields in flat]


def changes(experiments: Sequence[Experiment]) -> list[Changes]:
    """For each point, its values of those fields in which it is not like most of the points.

    A value that more than half of the points have is not a change.

    >>> changes of learning rates 1, 1, 1, 2
    {}, {}, {}, {"optimizer.learning_rate": 2}
    """
    rows = varying(experiments)
    usual = {}
    for name in rows[0]:
        (value, count), *_ = Counter(repr(row[name]) for row in rows).most_common(1)
        usual[name] = value if count > len(rows) / 2 else None
    return [
        {name: value for name, value in row.items() if repr(value) != usual[name]} for row in rows
    ]


def written(changed: Changes) -> str:
    """Changes in a line: "model.layers=4, data.sources.1.name absent"."""
    return ", ".join(
        f"{name} absent" if value is None else f"{name}={value}" for name, value in changed.items()
    )


def without_seed(experiment: Experiment) -> Experiment:
    """What is the same for points that differ in `train.seed` only."""
    return replace(experiment, name="", train=replace(experiment.train, seed=0))
