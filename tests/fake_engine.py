"""An engine without a model: its answers are given, and what it was asked is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from transfusion_jax.config import Experiment, SamplerConfig
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.devices import Devices
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import read_image
from transfusion_jax.training.observation import nothing


class NoModel(nnx.Module):
    """A model without parameters."""


@dataclass(frozen=True)
class Call:
    """What the engine was asked in one call of `generate`, and under which settings."""

    sampler: SamplerConfig
    requests: list[tuple]
    draw: bool = False
    """Whether every answer was to begin with an image."""

    @property
    def draws(self) -> bool:
        """Whether it asks for pictures: the last thing that each request holds is a text."""
        return all(isinstance(request[-1], str) for request in self.requests)


@dataclass(frozen=True)
class FakeEngine:
    """Answers each request by `answer(*request)`, a list of texts and pictures."""

    experiment: Experiment
    tokenizer: Tokenizer | None
    answer: Callable[..., list]
    calls: list[Call] = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    devices: Devices = Devices()
    moved: Callable[[], None] = nothing
    graph: Any = field(default_factory=lambda: nnx.split(NoModel())[0])
    codec: None = None
    require_pictures = Engine.require_pictures

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        return self.experiment.image.shape

    def generate(self, requests: Sequence[tuple], seed: int = 0, draw: bool = False) -> list[list]:
        self.calls.append(Call(self.experiment.sampler, list(requests), draw))
        return [list(self.answer(*request)) for request in requests]

    def using(self, **changes: object) -> "FakeEngine":
        sampler = replace(self.experiment.sampler, **changes)
        return replace(self, experiment=replace(self.experiment, sampler=sampler))

    def check(self, requests: Sequence[tuple]) -> int:
        """A prompt takes no position."""
        return self.experiment.sampler.max_tokens

    def read(self, path: Path) -> np.ndarray:
        return read_image(path, *self.picture_shape)

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        return image_hwc

    def latent(self, image_hwc: np.ndarray) -> np.ndarray:
        return image_hwc

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        return picture_HWC
