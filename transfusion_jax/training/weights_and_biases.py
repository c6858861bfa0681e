"""Weights & Biases: the metrics of a run there as well, if a project is named."""

import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.errors import WorkFailed, require
from transfusion_jax.files import write_atomic

IDENTITY = "wandb_id"
"""The file in a run directory that names the run there, so that restarts continue it."""


@dataclass(frozen=True)
class Project:
    """Where a run is shown.

    Raises:
      ValueError: the package is not installed.
    """

    project: str
    name: str
    """Of the run."""
    config: dict[str, Any]

    def __post_init__(self):
        require(
            importlib.util.find_spec("wandb") is not None,
            f"train.wandb_project={self.project!r} needs Weights & Biases: "
            "pip install 'transfusion-jax[wandb]'",
        )


class Mirror:
    """Sends what is logged to Weights & Biases.

    Rows carry their step as a value, since a resumed run logs some steps a second time, which the
    service would refuse as steps of its own.

    Raises:
      WorkFailed: the service refuses the run, or cannot be reached.
    """

    def __init__(self, project: Project, directory: Path):
        import wandb

        file = directory / IDENTITY
        if not file.exists():
            write_atomic(file, secrets.token_hex(4).encode())
        try:
            self._run = wandb.init(
                project=project.project,
                name=project.name,
                id=file.read_text(),
                resume="allow",
                config=project.config,
                dir=str(directory),
            )
        except wandb.Error as error:
            raise WorkFailed(f"Weights & Biases: {error}") from error
        self._image = wandb.Image
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, float | None]) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None})

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Pictures, uint8 [H, W, C]."""
        shown = {name: self._image(picture) for name, picture in pictures.items()}
        self._run.log({"step": step, **shown})

    def close(self) -> None:
        self._run.finish()
