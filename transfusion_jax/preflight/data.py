"""The data of a run as one process sees it: present, readable, and which data it is."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from transfusion_jax.config import Experiment
from transfusion_jax.data.pipeline import fitting_sources
from transfusion_jax.data.sources.dataset import file_digest
from transfusion_jax.data.sources.prepared import Prepared
from transfusion_jax.data.sources.registry import SOURCES
from transfusion_jax.data.sources.source import Source
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.files import local_path
from transfusion_jax.pretraining.initial import check_tokenizer, open_weights
from transfusion_jax.pretraining.run import latent_space, tokenizer_of
from transfusion_jax.pretraining.validation import held_out
from transfusion_jax.training.checkpoint import stored_steps
from transfusion_jax.training.owner import CONFIG


def data_facts(experiment: Experiment, directory: Path) -> dict[str, dict[str, str]]:
    """`digest` or `problem` of every source, and of the tokenizer's file if there is one.

    What is wrong with sources together, or with their tokenizer and the model, is a problem of the
    first.
    """
    facts = {}
    for source in experiment.data.sources:
        try:
            facts[source.name] = {"digest": _source_digest(source.name, experiment)}
        except Exception as error:  # every kind of damage raises something else
            facts[source.name] = {"problem": _described(source.name, error)}
    if path := experiment.tokenizer.path:
        try:
            facts[path] = {"digest": file_digest(local_path(path))}
        except (OSError, ValueError) as error:
            facts[path] = {"problem": str(error)}
    if not any("problem" in fact for fact in facts.values()):
        try:
            _check_together(experiment, directory)
        except ValueError as error:
            facts[experiment.data.sources[0].name] = {"problem": str(error)}
    return facts


def _check_together(experiment: Experiment, directory: Path) -> None:
    """Raises ValueError where sources, tokenizer and model do not fit; a tokenizer that is yet to
    be trained is not asked."""
    sources = fitting_sources(experiment, None, "train")
    latent_space(sources)
    if tokenizer := _known_tokenizer(experiment, directory, sources):
        fitting_sources(experiment, tokenizer, "train")
        if experiment.train.validate_every:
            held_out(experiment, tokenizer)


def _known_tokenizer(
    experiment: Experiment, directory: Path, sources: Sequence[tuple[str, Source]]
) -> Tokenizer | None:
    """That of the run; None where training is to make it."""
    known = experiment.tokenizer.path or (directory / CONFIG).exists()
    if known or any(source.assets.tokenizer for _, source in sources):
        return tokenizer_of(experiment, directory)
    return None


def initial_facts(experiment: Experiment, directory: Path) -> dict[str, dict[str, str]]:
    """The same of the weights that a new run in a directory starts from, if it starts from any."""
    initial = experiment.train.initial
    if not initial or stored_steps(directory / "checkpoints"):
        return {}
    tokenizer = None
    try:
        open_weights(initial, experiment)
        with contextlib.suppress(Exception):  # damage, which `data_facts` names
            sources = fitting_sources(experiment, None, "train")
            tokenizer = _known_tokenizer(experiment, directory, sources)
        if tokenizer:
            check_tokenizer(local_path(initial), tokenizer)
        described = (local_path(initial) / "config.json").read_bytes()
        return {initial: {"digest": hashlib.sha256(described).hexdigest()}}
    except (OSError, ValueError) as error:
        return {initial: {"problem": str(error)}}


def _source_digest(name: str, experiment: Experiment) -> str:
    """Identifies the content of a source.

    Raises:
      Exception: the data set is missing, damaged, unreadable or of another shape than the
        experiment's.
    """
    if name in SOURCES:
        return "built in"
    dataset = Prepared(local_path(name), experiment, "train").dataset
    if dataset.info["shards"]:
        dataset.record(0)  # sizes are compared by now; this one is read
    return hashlib.sha256((dataset.path / "dataset.json").read_bytes()).hexdigest()


def _described(name: str, error: Exception) -> str:
    """What went wrong; it names the source."""
    said = str(error) or type(error).__name__
    return said if name in said else f"cannot read {name}: {said}"
