"""What is looked at beside the training step: by whom, and what they saw."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Moved = Callable[[], None]
"""To be called between the parts of longer work, in all processes alike; what it raises ends it."""


def nothing() -> None:
    """A `Moved` that nobody waits for."""


@dataclass(frozen=True)
class Observation:
    """What was seen after a step."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Logged with the metrics of the step."""
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, uint8 [H, W, C]."""
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Observer:
    """Looks at a run every `every` steps, and after the last one.

    Every process looks, because all may be needed to compute; one writes what is seen.
    """

    every: int
    look: Callable[[int, Any, Moved], Observation]
    """(step, state, moved) -> what is seen after this step; it must not keep the state."""

    def due(self, step: int, steps: int) -> bool:
        """Whether it looks after this step of a run of so many."""
        return step % self.every == 0 or step == steps
