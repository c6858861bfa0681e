"""The fields of a config by their dotted names."""

import dataclasses
import math
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


def require_seed(seed: int) -> None:
    """Raises ValueError for a seed that JAX and numpy do not both take as it is."""
    require(0 <= seed < 2**32, f"train.seed={seed} must be in 0..2^32 - 1")
