"""Run directories with random weights, made without training, and their exports."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import tiny
from flax import traverse_util

from transfusion_jax.config import Experiment, MeshConfig
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.training.checkpoint import Checkpoints

ONE = MeshConfig(data=1)


@functools.cache
def a_tokenizer() -> Tokenizer:
    """A byte-pair model of 298 entries, so that BOI is 298 and EOI 299."""
    return train_tokenizer(["a small red star", "two blue rings and a star"] * 20, 298)


def planned(experiment: Experiment, mesh: MeshConfig = ONE):
    axes = mesh.axes.values()
    return blueprint(
        experiment, make_mesh(mesh, jax.devices()[: functools.reduce(int.__mul__, axes)])
    )


def weights(experiment: Experiment, seed: int) -> dict:
    """Random ones, nested as a checkpoint holds them."""
    return tiny.random_parameters(planned(experiment), seed)


def run_directory(
    path: Path,
    experiment: Experiment,
    steps: tuple[int, ...] = (3,),
    mesh: MeshConfig = ONE,
    tokenizer: Tokenizer | None = None,
    parameters: dict | None = None,
) -> Path:
    """A run with a checkpoint of each of these steps: `weights` of seed `step` are its average,
    those of `step` + 1 are raw; or `parameters` are both."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(dumps(experiment))
    (path / "tokenizer.model").write_bytes((tokenizer or a_tokenizer()).model)
    plan = planned(experiment, mesh)
    state = plan.initialise()
    saved = Checkpoints(path / "checkpoints", 9, print)
    shardings = jax.tree.map(lambda x: x.sharding, plan.abstract.parameters)
    for step in steps:
        average, raw = (
            jax.device_put(parameters or weights(experiment, seed), shardings)
            for seed in (step, step + 1)
        )
        saved.save(
            replace(state, step=jax.numpy.int32(step), ema=average, parameters=raw),
            {"train_seconds": 1.0, "data": []},
        )
    saved.close()
    return path


def flat(parameters: dict) -> dict:
    """By dotted name."""
    return {
        ".".join(map(str, path)): value
        for path, value in traverse_util.flatten_dict(parameters).items()
    }
