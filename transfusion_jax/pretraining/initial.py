"""`train.initial`: the weights that a new run starts from, instead of drawing them.

A directory in the layout of `model/published.py`, as exports and imports write it. Files are mapped
and every process reads its own parts of them, so the mesh is that of the run, whatever theirs was.
Where the weights are of text alone, the layers around images are drawn from the seed. Where they
have none apart for images, and the model has, these start as those of text.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.config.fields import flat
from transfusion_jax.data.sources.dataset import directory_digest
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.files import local_path
from transfusion_jax.model.published import (
    Tensor,
    from_published,
    model_config,
    of_text,
    tensors,
)
from transfusion_jax.parallel.processes import gathered
from transfusion_jax.pretraining.state import Blueprint, drawn_parameters
from transfusion_jax.tensors import check_shapes, open_tensors
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.state import State, initial_fields, initialise

DRAWN = "patches."
"""Parameters that weights of text alone do not have."""
MEANING = (
    "text_config.num_attention_heads",
    "text_config.num_key_value_heads",
    "text_config.rms_norm_eps",
    "text_config.rope_theta",
    "text_config.rope_parameters.rope_type",
    "text_config.rope_parameters.factor",
    "text_config.rope_parameters.low_freq_factor",
    "text_config.rope_parameters.high_freq_factor",
    "text_config.rope_parameters.original_max_position_embeddings",
    "text_config.norm_placement",
    "image_config.images",
    "image_config.codes",
    "image_config.channels",
    "image_config.patch_size",
    "image_config.patch_encoder",
    "image_config.patch_position",
    "image_config.timestep",
)
"""Of a config.json: what weights of the same shapes mean something else under."""


@dataclass(frozen=True)
class Weights:
    """Weights that fit a model."""

    tensors: Mapping[str, np.ndarray]
    """By published name; mapped."""
    parts: Mapping[str, list[Tensor]]
    """Of every parameter that there is, by dotted name: itself, or its layers."""
    notes: tuple[str, ...]
    """What is different, and may be."""


def initialise_from(
    directory: str,
    planned: Blueprint,
    tokenizer: Tokenizer,
    report: Report,
    autoencoder: Path | None = None,
) -> Callable[[], State]:
    """What makes the state of step 0 from weights.

    Args:
      autoencoder: that of the run's latents or codes; None: images are pixels.

    Raises:
      ValueError: in any process: they are not there, damaged, or do not fit the model or the
        tokenizer.
    """
    problem, weights = None, None
    try:
        weights = open_weights(directory, planned.experiment)
        check_tokenizer(local_path(directory), tokenizer)
    except (OSError, ValueError) as error:
        problem = str(error)
    for process, line in enumerate(gathered(problem)):
        if line is not None:
            raise ValueError(line if line == problem else f"process {process}: {line}")
    report(f"starting from the weights in {directory}")
    theirs = _stored_config(local_path(directory)).get("autoencoder")
    if autoencoder and theirs and directory_digest(autoencoder) != theirs:
        report("  the images that they know are of another autoencoder than those of the data")
    for note in weights.notes:
        report(f"  {note}")
    return functools.partial(_state, weights, planned)


def open_weights(directory: str, experiment: Experiment) -> Weights:
    """The weights in a directory, checked against a model.

    Raises:
      ValueError: they are not there, damaged or do not fit.
    """
    path = local_path(directory)
    require(path.is_dir(), f"train.initial={directory} is not a directory")
    found = open_tensors(path)
    theirs, ours = _stored_config(path), model_config(experiment)
    notes = _compare(directory, theirs, ours)
    expected = list(tensors(experiment))
    if "image_config" not in theirs:
        drawn = {t.parameter for t in expected if t.parameter.startswith(DRAWN)}
        expected = [t for t in expected if t.parameter not in drawn]
        if drawn:
            notes.append(f"{len(drawn)} parameters of {DRAWN[:-1]} are drawn from the seed")
    copied: set[str] = set()
    if theirs.get("image_config", {}).get("experts", "shared") == "shared":
        copied = {t.parameter for t in expected if t.parameter != of_text(t.parameter)}
    if copied:
        expected = [t for t in expected if t.parameter not in copied]
        notes.append("the weights of images start as those of text")
    check_shapes(
        {tensor.name: tensor.published_shape for tensor in expected},
        {name: tensor.shape for name, tensor in found.items()},
        f"the weights in train.initial={directory} do not fit the model",
    )
    parts = defaultdict(list)
    for tensor in expected:
        parts[tensor.parameter].append(tensor)
    parts |= {name: parts[of_text(name)] for name in copied}
    return Weights(found, dict(parts), tuple(notes))


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / "config.json").read_text())
        require(isinstance(stored["text_config"], dict), "text_config is no object")
        return stored
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"train.initial={path} has no config.json of an export or import of transfusion_jax "
            f"({error}); `transfusion-jax import` makes one of weights of others"
        ) from None


def _compare(directory: str, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Settings that differ, of those that both name.

    Raises:
      ValueError: under one of them the weights mean something else.
    """
    old, new = flat(theirs), flat(ours)
    differ = {
        name: f"{name} {old[name]!r} -> {new[name]!r}"
        for name in new
        if name in old and old[name] != new[name]
    }
    wrong = [line for name, line in differ.items() if name in MEANING]
    require(
        not wrong, f"train.initial={directory} holds weights of another model: {'; '.join(wrong)}"
    )
    return [line for name, line in differ.items() if not name.startswith("text_config")]


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the weights were trained with another one."""
    theirs, stored = path / "tokenizer.model", _stored_config(path)
    boi = stored.get("boi_token_id", tokenizer.boi)
    require(
        theirs.exists() or boi == tokenizer.boi,
        f"the weights in train.initial={path} came without a tokenizer; BOI is token {boi} of "
        f"theirs and {tokenizer.boi} of this run's tokenizer, which is therefore another",
    )
    require(
        not theirs.exists() or theirs.read_bytes() == tokenizer.model,
        f"train.initial={path} was trained with another tokenizer; its own is "
        f"--tokenizer.path {theirs}",
    )


def _state(weights: Weights, planned: Blueprint) -> State:
    """The state of step 0; every process reads what its devices keep."""
    leaves, structure = jax.tree.flatten_with_path(planned.abstract.parameters)
    names = [".".join(str(part.key) for part in path) for path, _ in leaves]
    drawn = _drawn({name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)
                    if name not in weights.parts}, planned)  # fmt: skip
    arrays = [
        drawn[name] if name in drawn else _array(weights.tensors, weights.parts[name], leaf)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    parameters = jax.tree.unflatten(structure, arrays)

    def state(parameters):
        return State(**initial_fields(parameters, planned.optimizer))

    return initialise(state, planned.abstract, parameters)


def _array(
    tensors: Mapping[str, np.ndarray], parts: list[Tensor], leaf: jax.ShapeDtypeStruct
) -> Array:
    """A parameter, float32, placed as the mesh says."""
    stacked = parts[0].layer is not None

    def cut(part: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return from_published(part.parameter, tensors[part.name], part.shape)[index]

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.asarray(cut(parts[0], index), np.float32)
        layers = [cut(part, index[1:]) for part in parts[index[0]]]
        found = np.empty((len(layers), *layers[0].shape), np.float32)
        for layer, values in enumerate(layers):
            found[layer] = values
        return found

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)


def _drawn(leaves: Mapping[str, jax.ShapeDtypeStruct], planned: Blueprint) -> dict[str, Array]:
    """These parameters, drawn as a run without `train.initial` draws them."""
    if not leaves:
        return {}

    def draw():
        drawn, _ = jax.tree.flatten_with_path(drawn_parameters(planned.experiment))
        named = {".".join(str(part.key) for part in path): value for path, value in drawn}
        return {name: named[name] for name in leaves}  # XLA leaves out the others

    placed = {name: leaf.sharding for name, leaf in leaves.items()}
    return jax.jit(draw, out_shardings=placed)()
