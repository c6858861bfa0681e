"""A trainer as short as one can be, for tests of the training machine: a line fitted to points.

All that is its own: a config, a state (the common one), a step, its data, its description.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from transfusion_jax.config import MeshConfig, OptimizerConfig
from transfusion_jax.data.pipeline import batched
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.training.directory import check_directory, open_directory
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.loop import Run
from transfusion_jax.training.state import State, compiled, initial_fields, initialise, place
from transfusion_jax.training.update import (
    advance,
    learning_rate,
    make_optimizer,
    step_key,
    updated,
    updates_made,
)
from transfusion_jax.training.watchdog import Watch

ROWS = 8


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 12
    log_every: int = 1
    checkpoint_every: int = 5
    keep_checkpoints: int = 9
    failed_save: str = "continue"
    max_skipped_steps: int = 3


@dataclass(frozen=True)
class Line:
    """The experiment: y = slope * x, and noise."""

    RESUMABLE: ClassVar[tuple[str, ...]] = ("train.log_every", "colour")

    slope: float = 2.0
    colour: str = "red"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=0.5, warmup_steps=2, weight_decay=0)
    train: TrainConfig = TrainConfig()


def signal_at(step: int | None) -> Callable[[Watch], str | None]:
    """A `Watch.moved` for a run from step 0 on that a signal reaches in this step."""
    calls = itertools.count()  # the first is before any step
    return lambda watch: "SIGTERM" if next(calls) == step else None


def parameters() -> nnx.State:
    kernel = nnx.Param(jnp.zeros((1, 1)), out_sharding=(None, "mlp"), eager_sharding=False)
    offset = nnx.Param(jnp.zeros(1), out_sharding=("norm",), eager_sharding=False)
    return nnx.State({"kernel": kernel, "offset": offset})


def points(experiment: Line, rows: Sequence[int] = range(ROWS)) -> grain.MapDataset:
    """These rows of batches of (x, y) [rows, 2], which are NaN where the slope is NaN."""
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    pairs = np.stack([x, np.float32(experiment.slope) * x + 1], axis=1)
    stream = grain.MapDataset.source(pairs).seed(0).shuffle().repeat()
    return batched(stream, ROWS, rows, np.stack)


def train_step(experiment: Line, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    rate = learning_rate(experiment.optimizer, experiment.train.steps)

    def loss(parameters, batch, noise):
        y = batch[:, :1] @ parameters["kernel"] + parameters["offset"][None]
        return jnp.mean((y - batch[:, 1:] - noise) ** 2)

    def step(state, batch):
        noise = 0.01 * jax.random.normal(step_key(0, state.step), (ROWS, 1))
        value, gradients = jax.value_and_grad(loss)(state.parameters, batch, noise)
        new = updated(state, optimizer, gradients, 0.5)
        rate_now = rate(updates_made(state))
        state, counts = advance(state, new, value, optax.tree.norm(gradients))
        return state, {"loss": value, "learning_rate": rate_now, **counts}

    return step


def open_run(experiment: Line, directory: Path, report: Callable[[str], None]) -> Run:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    check_directory(experiment, directory)
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps, parameters())

    def initial_state():
        return State(**initial_fields(nnx.to_pure_dict(parameters()), optimizer))

    shapes = jax.eval_shape(initial_state)
    abstract = place(shapes, parameter_shardings(parameters(), mesh), mesh)
    feed = Feed(
        batches=functools.partial(points, experiment),
        rows=ROWS,
        prefetch=2,
        fingerprints=(("points", f"slope {experiment.slope}"),),
        unit="points",
        amount=ROWS,
    )
    return Run(
        directory=open_directory(
            directory, experiment, abstract, feed.fingerprints, lambda path: None, report
        ),
        settings=experiment.train,
        mesh=mesh,
        feed=feed,
        initialise=lambda: initialise(initial_state, abstract),
        step=compiled(train_step(experiment, optimizer), abstract),
        title="line: two parameters",
    )
