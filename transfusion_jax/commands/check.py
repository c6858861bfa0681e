"""`check`: finds what would fail on this machine or pod, before any compile."""

import argparse
import importlib
import shlex
from pathlib import Path

from transfusion_jax.commands import train
from transfusion_jax.commands.bad_input import user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import asked_experiment
from transfusion_jax.commands.joining import join_processes, use_cores
from transfusion_jax.commands.terminal import say_leading
from transfusion_jax.config import Experiment, ProcessesConfig


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.preflight.facts import collect
    from transfusion_jax.preflight.judgement import Asked, judge, table
    from transfusion_jax.training.watchdog import AGAIN

    for late in ("sklearn.svm", "transfusion_jax.training.board"):
        importlib.import_module(late)  # imported where it is needed, which is too late to find out
    with user_input():
        experiment = _joined(arguments)
    directory = arguments.run_dir or Path("runs") / experiment.name
    facts = collect(experiment, directory)
    asked = Asked(experiment.train.keep_checkpoints, _plan(arguments, experiment))
    findings = judge(facts, asked)
    failed = [finding for finding in findings if not finding.ok]
    say_leading(f"{experiment.name} in {directory}")
    say_leading(table(findings))
    if not failed:
        say_leading("all checks hold")
        return 0
    say_leading(f"fails: {', '.join(finding.check for finding in failed)}")
    return AGAIN if all(finding.passes for finding in failed) else 1


def _joined(arguments: argparse.Namespace) -> Experiment:
    """Loads the experiment and joins the other processes, which may have failed to load theirs.

    Raises:
      ValueError: in this or another process the experiment is missing or wrong; all raise the same.
    """
    from transfusion_jax.evaluation.suite import check_experiment
    from transfusion_jax.parallel.processes import gathered
    from transfusion_jax.training.profile import Window

    experiment = None
    problem = None
    try:
        experiment = asked_experiment(arguments)
        check_experiment(experiment)
        if arguments.profile:
            Window.parse(arguments.profile, experiment.train.steps)
    except ValueError as error:
        problem = str(error)
    join_processes(arguments, experiment.processes if experiment else ProcessesConfig())
    if experiment and not problem:
        use_cores(experiment)
    problems = gathered(problem)
    for process, said in enumerate(problems):
        if said is not None:
            where = "" if set(problems) == {said} else f"process {process}: "
            raise ValueError(f"{where}{said}")
    return experiment


def _plan(arguments: argparse.Namespace, experiment: Experiment) -> str:
    """The command that plans the same experiment."""
    words = ["transfusion-jax", "plan", arguments.experiment]
    if not experiment.mesh.topology:
        words += ["--topology", "NAME"]
    return shlex.join([*words, *arguments.overrides])


COMMAND = Command(
    "find what would fail on this machine or pod, before any compile",
    train.add_arguments,  # launchers pass the same words to both
    run,
    config=lambda: Experiment(name="NAME"),
)
