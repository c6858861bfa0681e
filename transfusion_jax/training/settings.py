"""The fields of a config that the training machine reads."""

from typing import Protocol


class Settings(Protocol):
    """What every kind of training has under `train.` in its config."""

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    failed_save: str
    """What a checkpoint that cannot be saved does: "continue" or "stop"."""
    max_skipped_steps: int
    """Training stops after this many steps in a row without finite gradients."""
