"""Experiments as JSON: stored in a run directory, read back, and compared when a run is resumed."""

import dataclasses
import json
import typing
from collections.abc import Callable
from typing import Any

from transfusion_jax.config.experiment import Experiment
from transfusion_jax.config.fields import flattened
from transfusion_jax.config.model import ImageConfig, ModelConfig


def differences(stored: Any, asked: Any) -> list[str]:
    """Fields, as `name: stored -> asked`, that forbid resuming `stored` as `asked`.

    Those are all that differ, except the ones that the class lists as `RESUMABLE`.
    """
    old, new = flattened(stored), flattened(asked)
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not name.startswith(type(asked).RESUMABLE)
    ]


def dumps(experiment: Experiment) -> str:
    """The experiment as JSON, from which `loads` makes the same one."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def loads(
    text: str | bytes,
    name: str,
    kind: type = Experiment,
    report: Callable[[str], None] | None = None,
) -> Any:
    """The experiment of a JSON text.

    Args:
      name: of the text, for messages.
      report: is told what had to change in an experiment stored by an earlier version.

    Raises:
      ValueError: the text does not hold an experiment of this kind.
    """
    try:
        values = json.loads(text)
        if kind is Experiment and (change := _make_room_for_an_image(values)) and report:
            report(f"{name}: {change}")
        return _build(kind, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} does not hold an experiment of this version: {error}") from error


def _make_room_for_an_image(values: dict) -> str:
    """Raises a `sampler.max_tokens` that has no room for an image, and says so.

    Earlier versions accepted such a value.
    """
    sampler, span = values["sampler"], _build(ImageConfig, values["image"]).span
    text_alone = _build(ModelConfig, values["model"]).images == "none"
    if text_alone or (stored := sampler["max_tokens"]) >= span:
        return ""
    sampler["max_tokens"] = span
    return (
        f"sampler.max_tokens={stored} has no room for an image, which takes {span} positions; "
        f"{span} is used instead, --max-tokens changes it"
    )


def _build(kind: Any, value: Any) -> Any:
    """The inverse of `dataclasses.asdict` after a trip through JSON.

    Earlier versions stored 200.0 where an integer is due.
    """
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], part) for name, part in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], part) for part in value)
    return int(value) if kind is int and isinstance(value, float) and value % 1 == 0 else value
