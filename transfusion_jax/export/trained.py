"""What every format exports: a run's weights of one step, read array by array."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.model.published import Axes, parameters
from transfusion_jax.pretraining.run import stored
from transfusion_jax.tensors import check_shapes
from transfusion_jax.training.arrays import DamagedArray, StoredArrays, stored_arrays
from transfusion_jax.training.checkpoint import CheckpointError, Report, stored_steps

Weights = Literal["average", "raw"]
TREES: dict[Weights, str] = {"average": "ema", "raw": "parameters"}
"""By what they are called on the command line, the trees of a checkpoint."""


@dataclass(frozen=True)
class Trained:
    """A run's weights of one step, its settings and its tokenizer."""

    run_dir: Path
    experiment: Experiment
    tokenizer: Tokenizer
    step: int
    weights: Weights
    shapes: dict[str, jax.ShapeDtypeStruct]
    """By dotted name, as in "transformer.blocks.attention.q_DNH"; a stacked one has its layers
    on axis 0."""
    axes: dict[str, Axes]
    """Logical axes of the same."""
    arrays: StoredArrays

    def read(self, name: str) -> np.ndarray:
        """One array, float32, stacked where its shape is. Nothing of it is kept here.

        Raises:
          DamagedArray: it cannot be decoded.
        """
        return self.arrays.read(name)

    def by_layer(self, name: str) -> Iterator[np.ndarray]:
        """The layers of a stacked array, or the one array that is not stacked; not all of a large
        array is held."""
        yield from self.arrays.parts(name) if self.stacked(name) else (self.read(name),)

    def stacked(self, name: str) -> bool:
        return self.axes[name][:1] == ("layers",)


def open_trained(run_dir: Path, step: int | None, weights: Weights, report: Report) -> Trained:
    """The weights of a step, or of the newest readable checkpoint; their checksum is verified.

    Asks no other process.

    Raises:
      ValueError: `run_dir` is no run of a model, has no checkpoint (of this step), or its
        checkpoint does not fit its config.
      CheckpointError: what there is cannot be read.
    """
    experiment, tokenizer = stored(run_dir, report)
    directory = run_dir / "checkpoints"
    steps = stored_steps(directory)
    require(bool(steps), f"there is no checkpoint in {directory} yet")
    require(step is None or step in steps, f"no checkpoint of step {step} in {directory}: {steps}")
    known = parameters(experiment)
    shapes = {name: leaf for name, (leaf, _) in known.items()}
    axes = {name: axes for name, (_, axes) in known.items()}
    for asked in reversed(steps) if step is None else [step]:
        try:
            arrays = stored_arrays(directory / str(asked), TREES[weights])
            check_shapes(
                {name: leaf.shape for name, leaf in shapes.items()},
                arrays.shapes,
                f"{arrays.path} does not fit the config of {run_dir}",
            )
            arrays.verify()
        except DamagedArray as error:
            report(f"checkpoint {directory / str(asked)} is damaged ({error})")
            continue
        report(f"{weights} weights of step {asked} of {run_dir}")
        return Trained(run_dir, experiment, tokenizer, asked, weights, shapes, axes, arrays)
    which = "" if step is None else f" of step {step}"
    raise CheckpointError(f"no checkpoint{which} in {directory} can be read")
