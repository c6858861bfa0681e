"""What `train` looks at a run with, beyond what the run brings."""

from dataclasses import replace

from transfusion_jax.config import Experiment
from transfusion_jax.evaluation.samples import sampler
from transfusion_jax.evaluation.suite import check_suites
from transfusion_jax.generation.engine import engine_without_weights
from transfusion_jax.pretraining.run import tokenizer_of
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.loop import Run
from transfusion_jax.training.profile import Window


def equipped(run: Run, experiment: Experiment, window: Window | None, report: Report) -> Run:
    """The run with samples, if it asks for them, and with a profile of a window of steps.

    Raises:
      ValueError: a prompt is longer than a row, or a suite cannot measure the model, which would
        show after the last step otherwise.
    """
    instruments = run.instruments
    if experiment.evaluation:
        directory = run.directory.path
        tokenizer = tokenizer_of(experiment, directory)
        engine = engine_without_weights(experiment, tokenizer, directory, run.mesh, report)
        check_suites(engine, experiment.evaluation)
    if experiment.train.sample_every:
        samples = sampler(experiment, run.directory.path, run.mesh, report)
        instruments = replace(instruments, observers=(*instruments.observers, samples))
    if window is not None and window.start <= run.directory.start:  # started again
        report(f"--profile {window.start}:{window.stop}: these steps are taken; nothing is traced")
    elif window is not None:
        instruments = replace(instruments, profile=window)
    return replace(run, instruments=instruments)
