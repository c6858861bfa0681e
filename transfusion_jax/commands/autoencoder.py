"""`autoencoder`: trains a VAE or VQ-VAE, or resumes it."""

import argparse
from pathlib import Path

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.commands.bad_input import local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import add_experiment, asked_experiment
from transfusion_jax.commands.joining import add_processes, join_processes
from transfusion_jax.commands.terminal import say, say_leading, table


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


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.autoencoder.training.run import open_run, train_autoencoder
    from transfusion_jax.parallel.processes import is_leader
    from transfusion_jax.training.watchdog import AGAIN, Watch

    with Watch() as watch:
        with user_input():
            experiment = asked_experiment(arguments, AutoencoderExperiment)
            directory = arguments.run_dir or Path("runs") / experiment.name
            join_processes(arguments, experiment.processes)
            watch.against_stalls(experiment.processes.stall_timeout, directory)
            opened = open_run(experiment, directory, say_leading)
        summary = train_autoencoder(opened, say_leading, watch)
    if summary is None:
        return AGAIN
    if is_leader():
        say(table(summary))
        say(f"pictures  {directory / 'samples' / 'reconstructions.png'}")
        say(f"numbers   {directory / 'summary.json'}")
        say(f"use       transfusion-jax prepare ... --autoencoder {directory}")
    return 0


COMMAND = Command(
    "train an autoencoder, or resume it",
    add_arguments,
    run,
    config=lambda: AutoencoderExperiment(name="NAME"),
)
