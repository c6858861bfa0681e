"""`sweep`: runs the points of a sweep, lists them, or shows them in one table."""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_jax.commands.bad_input import check_directory, local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import Sweep, load_sweep
from transfusion_jax.commands.terminal import say
from transfusion_jax.config import Experiment
from transfusion_jax.errors import ComeAgain, WorkFailed, require
from transfusion_jax.files import write_atomic
from transfusion_jax.sweeps.points import Point, changes, check_runs, chosen, make_points, written
from transfusion_jax.sweeps.runner import RESTARTS, asks_again, run_points
from transfusion_jax.sweeps.table import as_csv, as_markdown, listed, make_rows, shown

PROGRAM = (sys.executable, "-m", "transfusion_jax")
"""What trains a point."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} FILE [options] [--FIELD VALUE ...]"
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="a Python file with sweep(), which yields named experiments, and perhaps published(), "
        "which returns {point: {metric: number}}",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME", help="run the points of these names")
    which.add_argument(
        "--index",
        type=int,
        metavar="I",
        help="run the I-th point, counted from 0; for array jobs, which are started again from "
        "outside where the exit code is 42",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--list",
        action="store_true",
        help="print the points, what each changes, and published numbers; run nothing",
    )
    what.add_argument(
        "--dry-run", action="store_true", help="print the commands that would be run; run nothing"
    )
    what.add_argument(
        "--table",
        action="store_true",
        help="print the table of all points as they are now, and write it; run nothing",
    )
    parser.add_argument(
        "--out",
        type=local,
        metavar="DIR",
        help="where the points are run, DIR/<point>, and the table is written "
        "(default: runs/<name of the file>)",
    )


def run(arguments: argparse.Namespace) -> int:
    with user_input():
        if arguments.file is None:
            raise ValueError(f"name a sweep file (see {arguments.prog} --help)")
        found = load_sweep(arguments.file, arguments.overrides)
        directory = arguments.out or Path("runs") / Path(arguments.file).stem
        check_directory("--out", directory)
        points = make_points(found.experiments, directory)
        asked = chosen(points, arguments.only, arguments.index)
        require(
            not arguments.table or asked == points,
            "--table shows all points: --only and --index do not go with it",
        )
        if arguments.list:
            say(_listing(points, asked, found))
            return 0
        check_runs(points, asked, directory)
    command = functools.partial(_command, arguments.file, arguments.overrides)
    if arguments.dry_run:
        for point in asked:
            say(f"# {point.name}: {point.status()}")
            if point.status() != "finished":
                say(shlex.join(command(point)))
        return 0
    # Who starts array jobs starts them again, and does so for all processes of a point together.
    restarts = RESTARTS if arguments.index is None else 0
    failed = {} if arguments.table else run_points(asked, command, say, restarts)
    _tabulate(points, found, directory)
    if failed:
        named = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        if arguments.index is not None and asks_again(*failed.values()):
            raise ComeAgain(f"{named} is not done; the same command does the rest")
        raise WorkFailed(f"{len(failed)} of {len(asked)} points failed: {named}")
    return 0


def _command(file: str, overrides: Sequence[str], point: Point) -> list[str]:
    """Trains a point, or resumes it."""
    train = ["train", f"{file}:{point.name}", "--run-dir", str(point.directory)]
    return [*PROGRAM, *train, *overrides]


def _listing(points: Sequence[Point], asked: Sequence[Point], found: Sweep) -> str:
    """A line for each of the points asked for, with its index, and one for its published
    numbers."""
    width = max(len(point.name) for point in asked)
    lines = []
    for index, (point, changed) in enumerate(zip(points, changes(found.experiments), strict=True)):
        if point not in asked:
            continue
        lines.append(f"{index:3}  {point.name:{width}}  {written(changed) or '(as most points)'}")
        if numbers := found.published.get(point.name):
            said = ", ".join(f"{name} {shown(number)}" for name, number in numbers.items())
            lines.append(f"{'':{width + 5}}  published: {said}")
    return "\n".join(lines)


def _tabulate(points: Sequence[Point], found: Sweep, directory: Path) -> None:
    """Writes the table, as Markdown, CSV and a picture, and prints the first."""
    from transfusion_jax.sweeps.figure import draw

    for point in points:
        if trouble := point.trouble():
            say(f"{point.name} is left out: {trouble}")
    rows = make_rows(points, found.published)
    text = as_markdown(rows)
    directory.mkdir(parents=True, exist_ok=True)
    if gone := listed(directory / "table.csv") - {point.name for point in points}:
        say(f"no longer in the table: {', '.join(sorted(gone))}, which this sweep does not have")
    write_atomic(directory / "table.md", text.encode())
    write_atomic(directory / "table.csv", as_csv(rows).encode())
    if not (drawn := draw(rows, directory / "table.png")):
        (directory / "table.png").unlink(missing_ok=True)  # of an earlier table
    say(f"\n{text}")
    say(f"table  {directory / 'table.md'}, table.csv{', table.png' if drawn else ''}")


COMMAND = Command(
    "run the points of a sweep, and show them in one table",
    add_arguments,
    run,
    config=lambda: Experiment(name="NAME"),
    load=lambda file, kind: load_sweep(file).experiments[0],
)
