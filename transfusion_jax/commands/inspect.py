"""`inspect`: draws a packed row of an experiment's data and counts what the rows hold."""

import argparse
from pathlib import Path

from transfusion_jax.commands.bad_input import check_file, local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import add_experiment, asked_experiment
from transfusion_jax.commands.terminal import say
from transfusion_jax.config import Experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--row", type=int, default=0, metavar="N", help="which row of the run (default: 0)"
    )
    parser.add_argument(
        "--run-dir",
        type=local,
        metavar="DIR",
        help="the run that the row is of (default: runs/<name of the experiment>): its tokenizer "
        "is used, and an experiment of another config is refused (or, by default, noted)",
    )
    parser.add_argument(
        "--out",
        type=local,
        metavar="FILE",
        help="the picture, such as row.png (default: <name of the experiment>_row_<N>.png)",
    )


def _note_other_run(experiment: Experiment, directory: Path) -> None:
    """Says where the run that has the experiment's name is of another config."""
    from transfusion_jax.evaluation.inspection import check_run

    try:
        check_run(experiment, directory)
    except ValueError as error:
        say(f"note: {error}")


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.data.pipeline import Data
    from transfusion_jax.evaluation.inspection import check_run, inspect_row, totals
    from transfusion_jax.figures import check_format
    from transfusion_jax.pretraining.run import tokenizer_of

    with user_input():
        experiment = asked_experiment(arguments)
        if not 0 <= arguments.row < 10**15:
            raise ValueError(f"--row {arguments.row} must be in 0..10^15 - 1")
        out = arguments.out or Path(f"{experiment.name}_row_{arguments.row}.png")
        check_file("--out", out)
        check_format(out)
        directory = arguments.run_dir or Path("runs") / experiment.name
        if arguments.run_dir is not None:
            check_run(experiment, directory)
        elif (directory / "config.json").exists():
            _note_other_run(experiment, directory)
        data = Data(experiment, tokenizer_of(experiment, directory))
    say(inspect_row(data, arguments.row, out))
    say(totals(data))
    say(f"picture   {out}")
    return 0


COMMAND = Command(
    "draw a packed row of an experiment's data, and count what the rows hold",
    add_arguments,
    run,
    config=lambda: Experiment(name="NAME"),
)
