"""Parameters that are not trained: which, and trees without them.

Trees are nested dicts of arrays. What has no gradient is not in the tree of gradients, nor in the
optimizer's memory; it stays in the parameters and their average, bit for bit.
"""

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from transfusion_jax.errors import require


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    """The names that match some pattern, as a shell matches files: `*` any letters, dots too.

    Raises:
      ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        require(
            bool(matched), f"train.freeze: {pattern!r} matches no parameter{_near(pattern, names)}"
        )
        found |= set(matched)
    require(len(found) < len(names), f"train.freeze={patterns} leaves no parameter to train")
    return frozenset(found)


def _near(pattern: str, names: list[str]) -> str:
    """Names, and patterns of all names below a part of the model, that look like this."""
    parts = {
        ".".join(name.split(".")[:n]) + ".*"
        for name in names
        for n in range(1, name.count(".") + 1)
    }
    near = difflib.get_close_matches(pattern, [*sorted(parts), *names], 3, 0.4)
    return f"; perhaps you meant {' or '.join(near)}" if near else f", as {names[0]} would"


def without(tree: Any, frozen: Collection[str], prefix: str = "") -> Any:
    """The tree without the leaves of these dotted names; what is no dict stays as it is."""
    if not isinstance(tree, dict):
        return tree
    kept = {
        key: without(value, frozen, f"{prefix}{key}.")
        for key, value in tree.items()
        if f"{prefix}{key}" not in frozen
    }
    return {key: x for key, x in kept.items() if not (isinstance(x, dict) and not x)}


def like(tree: Any, part: Any) -> Any:
    """What the tree has where `part` has something."""
    return (
        {key: like(tree[key], value) for key, value in part.items()}
        if isinstance(part, dict)
        else tree
    )


def merged(tree: Any, part: Any) -> Any:
    """The tree with what `part` has in place of its own."""
    if not isinstance(part, dict):
        return part
    return {key: merged(value, part[key]) if key in part else value for key, value in tree.items()}
