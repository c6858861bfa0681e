"""What is looked at beside the training step: by whom, and what they saw."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What was seen after a step; empty where nothing was due."""

    values: Mapping[str, float] = field(default_factory=dict)
    """Logged with the metrics of the step."""
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, uint8 [H, W, C]."""
    texts: Mapping[str, str] = field(default_factory=dict)


Observer = Callable[[int, Any], Observation]
"""(step, state) -> what is to be seen after this step; it must not keep the state.

Every process calls it at every step, so that all can compute; one writes what is seen."""
