"""What `train` looks at a run with, beyond what the run brings."""

from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from transfusion_jax.config import Experiment
from transfusion_jax.evaluation.samples import sampler
from transfusion_jax.evaluation.suite import check_suites
from transfusion_jax.generation.engine import engine_without_weights
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.processes import gathered
from transfusion_jax.pretraining.run import tokenizer_of
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.directory import check_directory
from transfusion_jax.training.loop import Run
from transfusion_jax.training.owner import CONFIG
from transfusion_jax.training.profile import Window


def check_resumed(experiment: Experiment, directory: Path, report: Report) -> None:
    """As `check_measurable` where there is a run already, whose numbers go once it is opened with
    other suites.

    Raises:
      ValueError: a suite cannot measure the model, or the run is of another config.
    """
    if gathered((directory / CONFIG).exists())[0]:
        check_directory(experiment, directory)
        check_measurable(experiment, directory, make_mesh(experiment.mesh), report)


def check_measurable(experiment: Experiment, directory: Path, mesh: Mesh, report: Report) -> None:
    """Raises ValueError if a suite cannot measure the model, which would show after the last step
    otherwise."""
    if experiment.evaluation:
        tokenizer = tokenizer_of(experiment, directory)
        engine = engine_without_weights(experiment, tokenizer, directory, mesh, report)
        check_suites(engine, experiment.evaluation)


def equipped(run: Run, experiment: Experiment, window: Window | None, report: Report) -> Run:
    """The run with samples, if it asks for them, and with a profile of a window of steps.

    Raises:
      ValueError: a prompt is longer than a row, or a suite cannot measure the model.
    """
    instruments = run.instruments
    if run.directory.start == 0:  # others were asked before they were opened
        check_measurable(experiment, run.directory.path, run.mesh, report)
    if experiment.train.sample_every:
        samples = sampler(experiment, run.directory.path, run.mesh, report)
        instruments = replace(instruments, observers=(*instruments.observers, samples))
    if window is not None and window.start <= run.directory.start:  # started again
        report(f"--profile {window.start}:{window.stop}: these steps are taken; nothing is traced")
    elif window is not None:
        instruments = replace(instruments, profile=window)
    return replace(run, instruments=instruments)
