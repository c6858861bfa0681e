"""Weights & Biases: the metrics of a run there as well, if a project is named."""

import importlib.util
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.errors import WorkFailed, require
from transfusion_jax.files import write_atomic

IDENTITY = "wandb_id"
"""The file in a run directory that names the run there, once there is one: restarts continue it."""


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
        identity = file.read_text() if file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project.project,
                name=project.name,
                id=identity,
                resume="allow",
                config=project.config,
                dir=str(directory),
            )
        except (wandb.Error, OSError) as error:
            raise WorkFailed(f"Weights & Biases: {error}") from error
        if not file.exists():
            write_atomic(file, identity.encode())
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


def mirror(project: Project, directory: Path, report: Callable[[str], None]) -> Mirror | None:
    """The mirror of a run; None where a run that was shown there goes on without it.

    Raises:
      WorkFailed: the service refuses a new run, or cannot be reached.
    """
    try:
        return Mirror(project, directory)
    except WorkFailed as error:
        if not (directory / IDENTITY).exists():
            raise
        report(f"{error}; this start is not shown there")
        return None
