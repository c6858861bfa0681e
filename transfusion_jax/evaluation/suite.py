"""Evaluation suites by name."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.config import Experiment
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources.registry import SOURCES
from transfusion_jax.data.sources.scenes.scene import SIDES
from transfusion_jax.errors import require
from transfusion_jax.evaluation import comparisons, digits, likelihood, pairs, scenes, sums
from transfusion_jax.generation.engine import Engine
from transfusion_jax.parallel.processes import is_leader

ROWS = 512
"""Held-out rows that a suite reads, unless asked for more."""

Measure = Callable[[Engine, Path, int | None], dict]
"""(engine, directory for pictures, most held-out rows to read or None) -> metrics by name."""


@dataclass(frozen=True)
class Suite:
    """What is measured, and on what it can be measured."""

    measure: Measure
    pictures: tuple[tuple[int, int, int], ...] = ()
    """Shapes [H, W, C] of the pictures that it can judge; none named: any, or none are needed."""
    draws: bool = False
    """Whether it asks the model for pictures."""
    held_out: bool = False
    """Whether it reads the held-out documents of the run's own sources."""


SUITES: dict[str, Suite] = {
    "digits": Suite(digits.digits, pictures=(digits.SHAPE,), draws=True),
    "sums": Suite(sums.sums),
    "comparisons": Suite(comparisons.comparisons),
    "likelihood": Suite(likelihood.likelihood, held_out=True),
    "pairs": Suite(pairs.pairs, draws=True, held_out=True),
    "scenes": Suite(scenes.scenes, pictures=tuple((side, side, 3) for side in SIDES), draws=True),
}


def check_experiment(experiment: Experiment) -> None:
    """Raises ValueError for a suite that does not exist, asks a model of text for pictures, or
    cannot judge a built-in source.

    What the pictures of prepared data are is known from the run directory only: `check_suites`.
    """
    check_names(experiment.evaluation)
    _check_draws(experiment, experiment.evaluation)
    if all(source.name in SOURCES for source in experiment.data.sources):
        _check_pictures(experiment.evaluation, experiment.image.shape)


def check_suites(engine: Engine, names: Sequence[str]) -> None:
    """Raises ValueError for a suite that does not exist, or cannot measure this model."""
    check_names(names)
    _check_draws(engine.experiment, names)
    _check_pictures(names, engine.picture_shape)
    if any(SUITES[name].draws for name in names):
        engine.require_pictures()
    if any(SUITES[name].held_out for name in names):
        _check_data(engine)


def _check_data(engine: Engine) -> None:
    """Raises ValueError for held-out data that is not what the model was trained for."""
    data = Data(engine.experiment, engine.tokenizer, "held_out")
    for source in data.sources:
        latents = source.source.assets.latents
        if latents is None or engine.codec is None:
            continue
        require(
            load_codec(latents.directory).digest == engine.codec.digest,
            f"{source.name} holds latents of another autoencoder than that of the run",
        )


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a suite that does not exist."""
    for name in names:
        require(name in SUITES, f"evaluation suite {name!r} is not one of {sorted(SUITES)}")


def _check_draws(experiment: Experiment, names: Sequence[str]) -> None:
    """Raises ValueError for a suite that asks a model of text alone for pictures."""
    for name in names:
        require(
            experiment.model.images != "none" or not SUITES[name].draws,
            f"suite {name!r} asks for pictures, and model.family={experiment.model.family!r} "
            "writes text alone",
        )


def _check_pictures(names: Sequence[str], shape: tuple[int, int, int]) -> None:
    for name in names:
        shapes = SUITES[name].pictures
        require(
            not shapes or shape in shapes,
            f"suite {name!r} judges pictures of {' or '.join(map(_size, shapes))}, "
            f"the model's are {_size(shape)}",
        )


def _size(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def evaluate(
    engine: Engine,
    names: Sequence[str],
    samples: Path,
    report: Callable[[str], None],
    rows: int | None = ROWS,
) -> dict:
    """Runs suites that pass `check_suites`; their metrics, after the number of parameters.

    Suites leave their pictures in `samples`, and read at most `rows` held-out rows (None: all).
    """
    with contextlib.ExitStack() as stack:
        if not is_leader():  # one process leaves pictures
            samples = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _evaluate(engine, names, samples, report, rows)


def _evaluate(
    engine: Engine,
    names: Sequence[str],
    samples: Path,
    report: Callable[[str], None],
    rows: int | None,
) -> dict:
    samples.mkdir(parents=True, exist_ok=True)
    metrics = {"parameters": sum(x.size for x in jax.tree.leaves(engine.parameters))}
    for name in names:
        report(f"evaluating: {name}")
        metrics |= SUITES[name].measure(engine, samples, rows)
    return metrics
