"""Experiments as the command line names them: loads a file, applies overrides."""

import argparse
import contextlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from transfusion_jax.config import Experiment


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
    return load_experiment(arguments.experiment, arguments.overrides, kind)


def load_experiment(spec: str, overrides: Sequence[str] = (), kind: type = Experiment) -> Any:
    """The experiment of a file, or with `file:name` of a point of its sweep, overrides applied.

    Raises:
      ValueError: the file, the point or an override is wrong, or the experiment is of another kind.
    """
    path, _, point = (spec, "", "") if os.path.exists(spec) else spec.partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"there is no experiment file {path}")
    if point:
        points = _points(path)
        if point not in points:
            raise ValueError(f"{path} has no point {point!r}, only {', '.join(points)}")
        found = points[point]
    else:
        found = _call(path, "config")
    if not isinstance(found, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{'sweep' if point else 'config'}() of {path} returns {type(found).__name__}, "
            f"not {article} {kind.__name__}"
        )
    return override(found, overrides)


def _points(path: str) -> dict[str, Any]:
    """The points of a sweep by name."""
    points = _call(path, "sweep")
    try:
        return {point.name: point for point in points}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"sweep() of {path} must yield experiments: {error}") from error


def _call(path: str, function: str) -> Any:
    """What a function of an experiment file returns; what a generator yields, as a list."""
    try:
        with _imports_beside(path):
            names = runpy.run_path(path)
        if function in names:
            found = names[function]()
            return list(found) if function == "sweep" else found
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} fails with {type(error).__name__}: {error}") from error
    raise ValueError(f"{path} has no function {function}()")


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
