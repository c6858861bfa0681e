"""Experiments as the command line names them: loads a file, applies overrides."""

import argparse
import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transfusion_jax.config import Experiment
from transfusion_jax.files import local_path


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Adds the argument EXPERIMENT, and overrides to the usage."""
    parser.usage = f"{parser.prog} EXPERIMENT [options] [--FIELD VALUE ...]"
    parser.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        nargs="?",
        help="a Python file with config(), or FILE:NAME for one point of its sweep()",
    )


def asked_experiment(arguments: argparse.Namespace, kind: type = Experiment) -> Any:
    """The experiment that the arguments name, with their overrides.

    Raises:
      ValueError: none is named, or it is wrong.
    """
    if arguments.experiment is None:
        raise ValueError(f"name an experiment file (see {arguments.prog} --help)")
    late = [word for word in arguments.overrides if word.endswith(".py")]
    if late and not os.path.isfile(arguments.experiment):
        raise ValueError(f"{late[0]} comes after --FIELD VALUE: name the experiment first")
    return load_experiment(arguments.experiment, arguments.overrides, kind)


def load_experiment(spec: str, overrides: Sequence[str] = (), kind: type = Experiment) -> Any:
    """The experiment of a file, or with `file:name` of a point of its sweep, overrides applied.

    Raises:
      ValueError: the file, the point or an override is wrong, or the experiment is of another kind.
    """
    path, point = (spec, "") if os.path.exists(spec) else _parts(spec)
    local_path(spec)  # of a URL, what stands before the colon is no path
    names = _names(path)
    if point:
        points = _points(path, names)
        if point not in points:
            raise ValueError(f"{path} has no point {point!r}, only {', '.join(points)}")
        found = points[point]
    else:
        found = _call(path, names, "config")
    _check_kind(path, "sweep" if point else "config", found, kind)
    return override(found, overrides)


def _parts(spec: str) -> tuple[str, str]:
    """The file, and the point of FILE:NAME; a folder may have a colon in its name."""
    path, colon, point = spec.rpartition(":")
    return (path, point) if colon and "/" not in point else (spec, "")


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    experiments: tuple[Experiment, ...]
    """At least one; their names differ."""
    published: Mapping[str, Mapping[str, float]]
    """Point -> metric -> number in print; empty where the file has no `published()`."""


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """The points of a file's sweep, overrides applied to each.

    Raises:
      ValueError: the file, a point or an override is wrong, or two points are one experiment.
    """
    names = _names(path)
    points = _points(path, names)
    if not points:
        raise ValueError(f"sweep() of {path} yields nothing")
    for point in points.values():
        _check_kind(path, "sweep", point, Experiment)
    published = _call(path, names, "published") if "published" in names else {}
    _check_published(path, published, points)
    experiments = tuple(override(point, overrides) for point in points.values())
    if [experiment.name for experiment in experiments] != list(points):
        raise ValueError("--name cannot be set for the points of a sweep: each has its own")
    first: dict[Experiment, str] = {}
    for experiment in experiments:
        same = first.setdefault(replace(experiment, name=""), experiment.name)
        if same != experiment.name:
            how = f" with {' '.join(overrides)}" if overrides else ""
            raise ValueError(f"{same} and {experiment.name} are one experiment{how}")
    return Sweep(experiments, published)


def _check_kind(path: str, function: str, found: Any, kind: type) -> None:
    if not isinstance(found, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{function}() of {path} returns {type(found).__name__}, not {article} {kind.__name__}"
        )


def _check_published(path: str, published: Any, points: Mapping[str, Any]) -> None:
    numbers = [
        number
        for row in (published.values() if isinstance(published, dict) else [None])
        for number in (row.values() if isinstance(row, dict) else [None])
    ]
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"published() of {path} must return {{point: {{metric: number}}}}")
    for name in published:
        if name not in points:
            raise ValueError(
                f"published() of {path} has no point {name!r} to stand beside, only "
                f"{', '.join(points)}"
            )


def _points(path: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """The points of a sweep by name."""
    points = {}
    found = _call(path, names, "sweep")
    try:
        for point in found:
            if point.name in points:
                raise ValueError(f"sweep() of {path} has two points called {point.name!r}")
            points[point.name] = point
    except (TypeError, AttributeError) as error:
        raise ValueError(f"sweep() of {path} must yield experiments: {error}") from error
    return points


def _names(path: str) -> dict[str, Any]:
    """What an experiment file defines."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no experiment file {path}")
    with _blaming(path), _imports_beside(path):
        return runpy.run_path(path)


def _call(path: str, names: Mapping[str, Any], function: str) -> Any:
    """What a function of an experiment file returns; what a generator yields, as a list."""
    if function not in names:
        raise ValueError(f"{path} has no function {function}()")
    with _blaming(path), _imports_beside(path):
        found = names[function]()
        return list(found) if function == "sweep" else found


@contextlib.contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Turns what an experiment file raises into a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} fails with {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _imports_beside(path: str) -> Iterator[None]:
    """Lets a file import those beside it, as one experiment does that is a diff of another."""
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def override(config: Any, arguments: Sequence[str]) -> Any:
    """Applies `--a.b VALUE` arguments to a config, checked against the types of its fields.

    Raises:
      ValueError: a field does not exist, or its value has another type or cannot work.
    """
    import tyro  # takes as long to import as all of `--help`

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(
                type(config),
                default=config,
                args=list(arguments),
                config=(tyro.conf.FlagConversionOff,),
                prog="transfusion-jax",
            )
    except SystemExit as stop:
        message = _one_line(said.getvalue()) if stop.code else ""
        raise ValueError(message or f"cannot use {' '.join(arguments)}") from None


def _one_line(box: str) -> str:
    """The message, and the nearest names, of one of tyro's boxes: title, message, hints."""
    lines = [line.strip("│| ") for line in box.splitlines() if line[:1] not in ("╰", "+")]
    parts = [" ".join(part.split()) for part in re.split("[─-]{3,}", "\n".join(lines))]
    _, message, *hints = [part for part in parts if part] + ["", ""]
    near = dict.fromkeys(
        name for hint in hints if "Perhaps" in hint for name in re.findall(r"--[\w.-]+", hint)
    )
    return message + (f"; perhaps you meant {' or '.join(near)}" if near else "")
