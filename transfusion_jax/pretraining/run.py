"""The run directory: what a run is made of on disk, opened for training or loaded for use.

config.json       the resolved experiment           metrics.jsonl   one object per logged step
tokenizer.model   its sentencepiece model           tensorboard/    the same, as event files
ledger.json       what became of every document     samples/        pictures
checkpoints/      Orbax                             summary.json    the numbers at the end
autoencoder/      of a run on latents           events.jsonl    what was odd about the loss
goodput.json      where the time went           profile/        traces of `--profile`
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.mixture import first_step
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.source import LatentSpace, Source
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.files import local_path, write_atomic
from transfusion_jax.model.work import batch_work, model_flops
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.processes import check_collectives, gathered, is_leader
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.initial import initialise_from
from transfusion_jax.pretraining.state import Blueprint, blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.pretraining.validation import validator
from transfusion_jax.training.checkpoint import Report, stored_steps
from transfusion_jax.training.directory import (
    RunDirectory,
    check_directory,
    copy_directory,
    open_directory,
)
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.loop import Run
from transfusion_jax.training.loss_watch import LossWatch
from transfusion_jax.training.owner import CONFIG
from transfusion_jax.training.weights_and_biases import Project


def open_run(experiment: Experiment, directory: Path, report: Report) -> Run:
    """Opens a new run, or the one in `directory`, after checking what can be checked beforehand.

    Raises:
      ValueError: something in the experiment cannot work on this machine; the directory belongs to
        another experiment, or is no run directory; or the data under the run has changed.
      CheckpointError: the run has checkpoints, and none can be read.
    """
    mesh = make_mesh(experiment.mesh)
    check_collectives(mesh)
    process_rows(batch_sharding(mesh), experiment.data.batch_rows)
    planned = blueprint(experiment, mesh)
    check_directory(experiment, directory)
    tokenizer = tokenizer_of(experiment, directory)
    data = Data(experiment, tokenizer)
    latents = latent_space([(source.name, source.source) for source in data.sources])
    feed = _feed(data, planned)
    validators = (validator(planned, mesh, tokenizer),) if experiment.train.validate_every else ()
    initialise = planned.initialise
    if experiment.train.initial and not gathered(stored_steps(directory / "checkpoints"))[0]:
        autoencoder = latents.directory if latents else None
        initialise = initialise_from(
            experiment.train.initial, planned, tokenizer, report, autoencoder
        )
    instruments = Instruments(validators, loss_watch(experiment), project=_project(experiment))

    def fill(path: Path) -> None:
        write_atomic(path / "tokenizer.model", tokenizer.model)
        if latents:
            copy_directory(latents.directory, path / "autoencoder")

    opened = open_directory(
        directory, experiment, planned.abstract, feed.fingerprints, fill, report
    )
    model = experiment.model
    return Run(
        directory=opened,
        settings=experiment.train,
        mesh=mesh,
        feed=feed,
        initialise=initialise,
        step=compiled_step(planned),
        title=f"{experiment.name}: a transformer of {planned.parameters:,} parameters "
        f"({model.layers} layers, width {model.width}, {model.heads} heads)",
        details=(*_frozen(planned), *_details(data, _ledger(data, opened))),
        instruments=instruments,
    )


def loss_watch(experiment: Experiment) -> LossWatch:
    """What is looked for in the loss of a run, and where its rows are."""
    train = experiment.train
    return LossWatch(
        spike_window=train.spike_window,
        spike_deviations=train.spike_deviations,
        stall_steps=train.stall_steps,
        seed=train.seed,
        rows=experiment.data.batch_rows,
        # Batch s, counted from 0, belongs to step s + 1.
        changes=frozenset(
            first_step(phase.start, train.steps) + 1 for phase in experiment.data.phases
        ),
    )


def _project(experiment: Experiment) -> Project | None:
    """Of Weights & Biases; None where it is not used."""
    project = experiment.train.wandb_project
    if not project:
        return None
    return Project(project, experiment.name, dataclasses.asdict(experiment))


def step_flops(planned: Blueprint) -> Callable[[Batch], float]:
    """What counts the model FLOPs of a step, from a batch in the host's memory."""
    experiment = planned.experiment
    patches = experiment.model.mutual_patches(experiment.image)
    each, trained = planned.multiplications, planned.trained_multiplications
    return lambda batch: model_flops(each, experiment, batch_work(batch, patches), trained)


def _feed(data: Data, planned: Blueprint) -> Feed:
    """The packed rows as the training loop reads them."""
    config = data.experiment.data
    names = [source.name for source in data.sources]
    return Feed(
        batches=data.batches,
        rows=config.batch_rows,
        prefetch=config.prefetch,
        fingerprints=tuple(zip(names, data.fingerprints(), strict=True)),
        unit="tokens",
        amount=config.batch_rows * config.row_length,
        epochs=data.epochs,
        flops=step_flops(planned),
    )


def _ledger(data: Data, opened: RunDirectory) -> dict[str, dict]:
    """What became of every document.

    Counted and written while the run has no checkpoint; once it has one, the data is known to be
    that of the stored ledger, which is read instead.
    """
    path = opened.path / "ledger.json"
    if opened.state is not None and path.exists():
        return json.loads(path.read_text())
    ledger = data.ledger()
    if is_leader():
        write_atomic(path, (json.dumps(ledger, indent=2) + "\n").encode())
    return ledger


def _frozen(planned: Blueprint) -> tuple[tuple[str, str], ...]:
    """A line about what is not trained, if anything is not."""
    if not planned.frozen:
        return ()
    patterns = ", ".join(planned.experiment.train.freeze)
    return (("frozen", f"{planned.parameters - planned.trained:,} of them: {patterns}"),)


def _details(data: Data, ledger: dict[str, dict]) -> tuple[tuple[str, str], ...]:
    """Lines about the data: what the rows hold, and sources that are read more than `max_epochs`
    times, or never, as those of a phase that a short run does not come to."""
    config = data.experiment.data
    sources = "; ".join(
        f"{name}: {counts['in_rows']} of {counts['documents']} documents in {counts['rows']} rows, "
        f"{counts['filled']:.0%} filled"
        for name, counts in ledger.items()
    )
    epochs = data.epochs(data.experiment.train.steps)
    repeated = [
        (
            "repeated",
            f"{name} is read {n:.1f} times, more than data.max_epochs={config.max_epochs:g}",
        )
        for name, n in epochs.items()
        if n > config.max_epochs
    ]
    unread = [
        ("unread", f"{name} is not read in {data.experiment.train.steps:,} steps")
        for name, n in epochs.items()
        if n == 0
    ]
    batch = f"{config.batch_rows} rows of {config.row_length} positions"
    return ("data", sources), ("batch", batch), *repeated, *unread


def stored(directory: Path, report: Report) -> tuple[Experiment, Tokenizer]:
    """The experiment and the tokenizer of an existing run; what an old one needs changed is
    reported.

    Raises:
      ValueError: `directory` is no run directory, or its tokenizer is lost.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not a run directory: it has no config.json")
    text = path.read_text(errors="replace")
    experiment = stored_config.loads(text, str(path), report=report)
    return experiment, tokenizer_of(experiment, directory)


def latent_space(sources: Sequence[tuple[str, Source]]) -> LatentSpace | None:
    """The latent space of sources, given by name; None where images are pixels.

    Raises:
      ValueError: sources have latents of different autoencoders, or at different scales.
    """
    named = [(name, source.assets.latents) for name, source in sources]
    spaces = [(name, space) for name, space in named if space is not None]
    for field in ("autoencoder", "scale", "shift"):
        names = {getattr(space, field): name for name, space in spaces}
        if len(names) > 1:
            raise ValueError(
                f"the latents of {' and '.join(names.values())} differ in {field}; prepare them "
                "with one autoencoder that brings its own scale"
            )
    return spaces[0][1] if spaces else None


def tokenizer_of(experiment: Experiment, directory: Path) -> Tokenizer:
    """The run's own tokenizer; for a new run, the one at `tokenizer.path` or that of the sources.

    Raises:
      ValueError: the run's own is lost, or there is none to take.
    """
    path = directory / "tokenizer.model"
    if not (directory / CONFIG).exists():  # an interrupted start may have left another's
        if not experiment.tokenizer.path:
            return _sources_tokenizer(experiment)
        path = local_path(experiment.tokenizer.path)
    elif not path.exists():
        raise ValueError(f"{directory} has lost its tokenizer.model: no other fits its weights")
    try:
        return Tokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def _sources_tokenizer(experiment: Experiment) -> Tokenizer:
    """The tokenizer that sources were prepared with, or else one trained on their text."""
    sources = load_sources(experiment, "train")
    names = [config.name for config in experiment.data.sources]
    brought = [
        (name, source.assets.tokenizer)
        for name, source in zip(names, sources, strict=True)
        if source.assets.tokenizer is not None
    ]
    if not brought:
        texts = itertools.chain.from_iterable(source.texts() for source in sources)
        return train_tokenizer(texts, experiment.tokenizer.vocab_size)
    first, tokenizer = brought[0]
    for name, other in brought[1:]:
        if other.model != tokenizer.model:
            raise ValueError(f"{first} and {name} were prepared with different tokenizers")
    return tokenizer
