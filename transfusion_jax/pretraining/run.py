"""The run directory: what a run is made of on disk, opened for training or loaded for use.

config.json       the resolved experiment           metrics.jsonl   one object per logged step
tokenizer.model   its sentencepiece model           tensorboard/    the same, as event files
ledger.json       what became of every document     samples/        pictures
checkpoints/      Orbax                             summary.json    the numbers at the end
autoencoder/      of a run on latents
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from transfusion_jax.config import Experiment
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.source import LatentSpace
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.files import write_atomic
from transfusion_jax.parallel.mesh import host_block, make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.state import Blueprint, State, blueprint
from transfusion_jax.training.checkpoint import Checkpoints, Report
from transfusion_jax.training.directory import check_directory, copy_directory


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    experiment: Experiment
    directory: Path
    tokenizer: Tokenizer
    data: Data
    mesh: Mesh
    blueprint: Blueprint
    checkpoints: Checkpoints
    state: State | None
    """The restored state; None for a run that starts."""
    train_seconds: float
    """Spent on the steps that the state holds."""

    def description(self) -> str:
        """What is being trained, on what, for how long."""
        config, start = self.experiment, 0 if self.state is None else int(self.state.step)
        left = config.train.steps - start
        parameters = sum(x.size for x in jax.tree.leaves(self.blueprint.abstract.parameters))
        tokens = config.data.batch_rows * config.data.row_length
        sources = "; ".join(
            f"{name}: {counts['in_rows']} of {counts['documents']} documents in {counts['rows']} rows, "
            f"{counts['filled']:.0%} filled"
            for name, counts in self.data.ledger().items()
        )
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return "\n".join([
            f"{config.name}: a transformer of {parameters:,} parameters "
            f"({config.model.layers} layers, width {config.model.width}, {config.model.heads} heads)",
            f"  data      {sources}",
            f"  training  {left} of {config.train.steps} steps ({tokens * left / 1e6:,.1f} M tokens), "
            f"each {config.data.batch_rows} rows of {config.data.row_length} positions",
            f"  devices   {len(jax.devices())} {jax.devices()[0].platform} ({mesh})",
            f"  run       {self.directory}",
            *self._repeated(),
            "compiling the training step; time left is shown from the second step on",
        ])  # fmt: skip

    def _repeated(self) -> list[str]:
        """A line for every source that the run reads more often than the experiment allows for."""
        most = self.experiment.data.max_epochs
        return [
            f"  repeated  {name} is read {epochs:.1f} times, more than data.max_epochs={most:g}"
            for name, epochs in self.data.epochs(self.experiment.train.steps).items()
            if epochs > most
        ]


def open_run(experiment: Experiment, directory: Path, report: Report) -> Run:
    """Opens a new run, or the one that is in `directory`, after checking all that can be checked before a step.

    Raises:
      ValueError: something in the experiment cannot work on this machine; the directory belongs to another
        experiment, or is no run directory; or the data under the run has changed.
      CheckpointError: the run has checkpoints, and none can be read.
    """
    mesh = make_mesh(experiment.mesh)
    host_block(batch_sharding(mesh), experiment.data.batch_rows)
    plan = blueprint(experiment, mesh)
    check_directory(experiment, directory)
    tokenizer = tokenizer_of(experiment, directory)
    data = Data(experiment, tokenizer)
    latents = latent_space(data)
    if not (directory / "config.json").exists() and jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "tokenizer.model", tokenizer.model)
        write_atomic(
            directory / "ledger.json", (json.dumps(data.ledger(), indent=2) + "\n").encode()
        )
        if latents:
            copy_directory(latents.directory, directory / "autoencoder")
        # Last: a directory with a config has all the rest.
        write_atomic(directory / "config.json", stored_config.dumps(experiment).encode())

    checkpoints = Checkpoints(directory / "checkpoints", experiment.train.keep_checkpoints, report)
    state, train_seconds = None, 0.0
    if restored := checkpoints.restore(plan.abstract):
        state, progress = restored
        digests = zip(data.sources, progress["data"], data.fingerprints(), strict=True)
        if changed := [source.name for source, old, new in digests if old != new]:
            raise ValueError(
                f"the data under {directory} has changed since it was trained: {', '.join(changed)}"
            )
        train_seconds = float(progress["train_seconds"])
    return Run(
        experiment, directory, tokenizer, data, mesh, plan, checkpoints, state, train_seconds
    )


def stored(directory: Path) -> tuple[Experiment, Tokenizer]:
    """The experiment and the tokenizer of an existing run.

    Raises:
      ValueError: `directory` is no run directory.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} is not a run directory: it has no config.json")
    experiment = stored_config.loads(path.read_text(), str(path))
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
    """The run's own tokenizer; for a new run, the one at `tokenizer.path` or that of the sources."""
    path = directory / "tokenizer.model"
    if not path.exists():
        if not experiment.tokenizer.path:
            return _sources_tokenizer(experiment)
        path = Path(experiment.tokenizer.path)
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
