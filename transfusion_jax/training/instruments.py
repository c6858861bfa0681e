"""What a run is looked at with, beyond what every run has."""

from dataclasses import dataclass

from transfusion_jax.training.loss_watch import LossWatch
from transfusion_jax.training.observation import Observer
from transfusion_jax.training.profile import Window
from transfusion_jax.training.weights_and_biases import Project


@dataclass(frozen=True)
class Instruments:
    observers: tuple[Observer, ...] = ()
    """Those that are due look in turn."""
    loss_watch: LossWatch | None = None
    profile: Window | None = None
    project: Project | None = None
    """Of Weights & Biases."""
