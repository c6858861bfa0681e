"""The run directory: what a run is made of on disk, opened for training or loaded for use.

config.json       the resolved experiment           metrics.jsonl   one object per logged step
tokenizer.model   its sentencepiece model           tensorboard/    the same, as event files
ledger.json       what became of every document     samples/        pictures
checkpoints/      Orbax                             summary.json    the numbers at the end
autoencoder/      of a run on latents
"""

import itertools
import json
from pathlib import Path

from transfusion_jax.config import Experiment
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.source import LatentSpace
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.files import local_path, write_atomic
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.processes import check_collectives, is_leader
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.directory import (
    RunDirectory,
    check_directory,
    copy_directory,
    open_directory,
)
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.loop import Run


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
    latents = latent_space(data)
    feed = _feed(data)

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
        initialise=planned.initialise,
        step=compiled_step(planned),
        title=f"{experiment.name}: a transformer of {planned.parameters:,} parameters "
        f"({model.layers} layers, width {model.width}, {model.heads} heads)",
        details=_details(data, _ledger(data, opened)),
    )


def _feed(data: Data) -> Feed:
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


def _details(data: Data, ledger: dict[str, dict]) -> tuple[tuple[str, str], ...]:
    """Lines about the data: what the rows hold, and sources read more than `max_epochs` times."""
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
    batch = f"{config.batch_rows} rows of {config.row_length} positions"
    return ("data", sources), ("batch", batch), *repeated


def stored(directory: Path, report: Report) -> tuple[Experiment, Tokenizer]:
    """The experiment and the tokenizer of an existing run; what an old one needs changed is
    reported.

    Raises:
      ValueError: `directory` is no run directory.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} is not a run directory: it has no config.json")
    experiment = stored_config.loads(path.read_text(), str(path), report=report)
    return experiment, tokenizer_of(experiment, directory)


def latent_space(data: Data) -> LatentSpace | None:
    """The latent space of the sources; None where images are pixels.

    Raises:
      ValueError: sources have latents of different autoencoders, or at different scales.
    """
    spaces = [(source.name, source.source.assets.latents) for source in data.sources]
    spaces = [(name, space) for name, space in spaces if space is not None]
    for field in ("autoencoder", "scale", "shift"):
        names = {getattr(space, field): name for name, space in spaces}
        if len(names) > 1:
            raise ValueError(
                f"the latents of {' and '.join(names.values())} differ in {field}; prepare them "
                "with one autoencoder that brings its own scale"
            )
    return spaces[0][1] if spaces else None


def tokenizer_of(experiment: Experiment, directory: Path) -> Tokenizer:
    """The run's own tokenizer; for a new run, the one at `tokenizer.path` or that of the
    sources."""
    path = directory / "tokenizer.model"
    if not path.exists():
        if not experiment.tokenizer.path:
            return _sources_tokenizer(experiment)
        path = local_path(experiment.tokenizer.path)
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
