"""Trains an autoencoder in a run directory.

config.json      the resolved experiment        samples/        reconstructions, during and after
metrics.jsonl    one object per logged step     summary.json    the numbers at the end
tensorboard/     the same, as event files       autoencoder/    the codec, of averaged weights
checkpoints/     Orbax
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training.judges import Judges, load_judges
from transfusion_jax.autoencoder.training.pictures import batches, fingerprint, pictures
from transfusion_jax.autoencoder.training.state import Blueprint, State, blueprint
from transfusion_jax.autoencoder.training.step import compiled_step
from transfusion_jax.autoencoder.training.summary import averaged, finish, reconstructor, show
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.processes import check_collectives, is_leader
from transfusion_jax.parallel.rules import batch_sharding, replicated
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.directory import check_directory, open_directory
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import Run, train
from transfusion_jax.training.observation import Moved, Observation, Observer, nothing
from transfusion_jax.training.watchdog import Watch

PREFETCH = 8  # batches read ahead of the step


@dataclass(frozen=True)
class AutoencoderRun:
    """A run that is ready to train, and what measures it at the end."""

    run: Run
    blueprint: Blueprint
    judges: Judges
    held_out: Sequence[np.ndarray]


def open_run(experiment: AutoencoderExperiment, directory: Path, report: Report) -> AutoencoderRun:
    """Opens a new run, or the one in `directory`, after checking what can be checked beforehand.

    Raises:
      ValueError: something in the experiment cannot work on this machine; the directory belongs to
        another experiment, or is no run directory; or the pictures under the run have changed.
      CheckpointError: the run has checkpoints, and none can be read.
    """
    mesh = make_mesh(experiment.mesh)
    check_collectives(mesh)
    process_rows(batch_sharding(mesh), experiment.train.batch, "train.batch")
    check_directory(experiment, directory)
    held_out = pictures(experiment, "held_out")
    known = pictures(experiment, "train")
    feed = _feed(experiment, known)
    judges = jax.device_put(load_judges(experiment, report), replicated(mesh))
    planned = blueprint(experiment, mesh)
    step = compiled_step(planned)

    def judged_step(state: State, image_Bhwc: jax.Array):
        return step(state, judges, image_Bhwc)

    run = Run(
        directory=open_directory(
            directory, experiment, planned.abstract, feed.fingerprints, _fill, report
        ),
        settings=experiment.train,
        mesh=mesh,
        feed=feed,
        initialise=planned.initialise,
        step=judged_step,
        title=_title(planned),
        details=(("data", f"{experiment.data}: {len(known)} pictures, {len(held_out)} held out"),),
        instruments=Instruments(observers=(_shower(planned, held_out, directory),)),
    )
    return AutoencoderRun(run, planned, judges, held_out)


def train_autoencoder(
    opened: AutoencoderRun, report: Report, watch: Watch | None = None
) -> dict[str, Any] | None:
    """Trains to the last step; the summary, or None if a signal stopped it.

    Raises:
      TrainingFailed: too many steps in a row without finite gradients, or the final checkpoint was
        not written.
    """
    with opened.run.directory.kept():  # no other run while this one is measured
        outcome = train(opened.run, report, watch)
        if outcome.stopped_by:
            return None
        return finish(
            opened.blueprint,
            outcome.state,
            opened.judges,
            opened.held_out,
            opened.run.directory.path,
            outcome.seconds,
            watch.check if watch else nothing,
        )


def _feed(experiment: AutoencoderExperiment, known: Sequence[np.ndarray]) -> Feed:
    """The pictures as the training loop reads them."""
    return Feed(
        batches=functools.partial(batches, experiment),
        rows=experiment.train.batch,
        prefetch=PREFETCH,
        fingerprints=(("pictures", fingerprint(known)),),
        unit="images",
        amount=experiment.train.batch,
    )


def _fill(directory: Path) -> None:
    """A new run's directory holds nothing beside its config."""


def _title(blueprint: Blueprint) -> str:
    model = blueprint.experiment.model
    side = model.size // model.downsampling
    return (
        f'{blueprint.experiment.name}: a "{model.kind}" autoencoder of '
        f"{blueprint.parameters:,} parameters, {model.size}x{model.size}x{model.channels} -> "
        f"{side}x{side}x{model.latent_channels}"
    )


def _shower(blueprint: Blueprint, held_out: Sequence[np.ndarray], directory: Path) -> Observer:
    """Writes a few reconstructions every `train.sample_every` steps."""
    reconstruct = reconstructor(blueprint)

    def look(step: int, state: State, moved: Moved) -> Observation:
        if is_leader():
            path = directory / "samples" / f"step_{step:07}.png"
            show(reconstruct, averaged(state), held_out, path)
        return Observation()

    return Observer(blueprint.experiment.train.sample_every, look)
