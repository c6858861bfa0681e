"""The fields of a config by their dotted names."""

import dataclasses
import math
import typing
from typing import Any

from transfusion_jax.errors import require


def flattened(config: Any) -> dict[str, Any]:
    """The values of a config without its structure: {"model.layers": 24, ...}."""
    return flat(dataclasses.asdict(config))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists, by dotted name."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {
        k: v for name, leaf in items for k, v in flat(leaf, f"{prefix}.{name}".lstrip(".")).items()
    }


def require_finite(config: Any) -> None:
    """Raises ValueError for a number that is infinite or NaN."""
    for name, value in flattened(config).items():
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{name}={value} must be a finite number")


def require_types(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a value that is not of its field's type, or not one of its names.

    Python takes `kind="Muon"` or `steps=1e5` as they are, and what is compared with "muon" would
    then be something else.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _require_type(f"{prefix}{field.name}", getattr(config, field.name), kinds[field.name])


def _require_type(name: str, value: Any, kind: Any) -> None:
    parts = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        names = ", ".join(map(repr, parts))
        require(value in parts, f"{name}={value!r} is not one of {names}")
    elif origin is tuple:
        require(isinstance(value, tuple), f"{name}={value!r} must be a tuple, as in (a, b) or (a,)")
        for number, part in enumerate(value):
            _require_type(f"{name}.{number}", part, parts[0])
    elif dataclasses.is_dataclass(kind):
        require(isinstance(value, kind), f"{name}={value!r} must be of {kind.__name__}")
        require_types(value, f"{name}.")
    else:
        accepted, word = _PLAIN[kind]
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        require(fits, f"{name}={value!r} must be {word}")


_PLAIN = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
}
"""By the type of a field: what it takes, and that in words."""


def require_seed(seed: int) -> None:
    """Raises ValueError for a seed that JAX and numpy do not both take as it is."""
    require(0 <= seed < 2**32, f"train.seed={seed} must be in 0..2^32 - 1")
