"""`train`: trains an experiment or resumes it, then evaluates it."""

import argparse
import importlib
from pathlib import Path

from transfusion_jax.commands.bad_input import local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import add_experiment, asked_experiment
from transfusion_jax.commands.joining import add_processes, join_processes, use_cores
from transfusion_jax.commands.terminal import say, say_leading, table
from transfusion_jax.config import Experiment
from transfusion_jax.host import cache_compiled, process_start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--run-dir",
        type=local,
        metavar="DIR",
        help="where the run is kept; one that is already there is resumed "
        "(default: runs/<name of the experiment>)",
    )
    add_processes(parser)
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace steps START to STOP into <run>/profile, for xprof or TensorBoard",
    )


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.commands.instruments import check_resumed, equipped
    from transfusion_jax.evaluation.suite import check_experiment
    from transfusion_jax.evaluation.summary import summarise
    from transfusion_jax.parallel.processes import is_leader, noticing_loss
    from transfusion_jax.pretraining.run import open_run
    from transfusion_jax.training.loop import train
    from transfusion_jax.training.profile import Window
    from transfusion_jax.training.watchdog import AGAIN, Watch

    with Watch() as watch:
        # Imported late otherwise, after the compilation: what is wrong with it should show now.
        importlib.import_module("transfusion_jax.training.board")
        with user_input():
            experiment = asked_experiment(arguments)
            check_experiment(experiment)
            steps = experiment.train.steps
            window = Window.parse(arguments.profile, steps) if arguments.profile else None
            directory = arguments.run_dir or Path("runs") / experiment.name
            join_processes(arguments, experiment.processes)
            use_cores(experiment)
            watch.against_stalls(experiment.processes.stall_timeout, directory)
            check_resumed(experiment, directory, say_leading)
            opened = open_run(experiment, directory, say_leading)
            opened = equipped(opened, experiment, window, say_leading)
        cache_compiled(say_leading)
        with opened.directory.kept():  # started again, it must not evaluate beside this one
            outcome = train(opened, say_leading, watch, process_start())
            if outcome.stopped_by:
                return AGAIN
            seconds = outcome.seconds
            account = outcome.account
            del outcome, opened  # evaluation needs the averaged weights only
            with user_input(), noticing_loss():
                summary = summarise(directory, seconds, account, say_leading, watch.check)
    if is_leader():
        _report(directory, summary)
    return 0


def _report(directory: Path, summary: dict) -> None:
    samples = directory / "samples"
    say(table(summary))
    say(f"pictures  {', '.join(map(str, sorted(samples.glob('*.png'))))}")
    say(f"curve     {directory / 'metrics.jsonl'}")
    say(f"numbers   {directory / 'summary.json'}")


COMMAND = Command(
    "train an experiment, or resume it",
    add_arguments,
    run,
    config=lambda: Experiment(name="NAME"),
)
