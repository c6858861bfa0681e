"""Experiments as JSON: stored in a run directory, read back, and compared when a run is resumed."""

import dataclasses
import json
import typing
from typing import Any

from transfusion_jax.config.experiment import Experiment

# Fields that do not change what is trained, so a run may be resumed with others.
RESUMABLE = (
    "mesh.", "model.remat", "model.attention", "data.prefetch", "data.max_epochs", "train.accumulation",
    "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.sample_every",
)  # fmt: skip


def differences(stored: Experiment, asked: Experiment) -> list[str]:
    """Fields, as `name: stored -> asked`, that forbid resuming `stored` as `asked`."""
    old, new = _flatten(dataclasses.asdict(stored)), _flatten(dataclasses.asdict(asked))
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not name.startswith(RESUMABLE)
    ]


def dumps(experiment: Experiment) -> str:
    """The experiment as JSON, from which `loads` makes the same one."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def loads(text: str, name: str, kind: type = Experiment) -> Any:
    """The experiment of a JSON text; raises ValueError, with the text's name, if it does not hold
    one of this kind."""
    try:
        return _build(kind, json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not hold an experiment of this version: {error}") from error


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {
        k: v
        for name, leaf in items
        for k, v in _flatten(leaf, f"{prefix}.{name}".lstrip(".")).items()
    }


def _build(kind: Any, value: Any) -> Any:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], part) for name, part in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], part) for part in value)
    return value
