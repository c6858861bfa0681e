"""Evaluation suites by name, and what a run says of itself at its end."""

from collections.abc import Callable
from pathlib import Path

import jax

from transfusion_jax.evaluation import digits as digits_lib
from transfusion_jax.evaluation.comparisons import comparisons
from transfusion_jax.evaluation.digits import digits_grid
from transfusion_jax.evaluation.likelihood import likelihood
from transfusion_jax.evaluation.pairs import pairs
from transfusion_jax.evaluation.scenes import scenes
from transfusion_jax.evaluation.sums import sums
from transfusion_jax.generation.engine import Engine


def digits(engine: Engine, samples: Path) -> dict:
    """Draws and reads digits; leaves the picture `digits.png`."""
    classifier, classifier_accuracy = digits_lib.judge()
    drawn, captions = digits_lib.draw(engine, classifier), digits_lib.read(engine)
    digits_grid(drawn, captions, samples / "digits.png")
    return digits_lib.scores(drawn, captions, classifier_accuracy)


SUITES: dict[str, Callable[[Engine, Path], dict]] = {
    "digits": digits,
    "sums": lambda engine, samples: sums(engine),
    "comparisons": lambda engine, samples: comparisons(engine),
    "likelihood": lambda engine, samples: likelihood(engine),
    "pairs": pairs,
    "scenes": scenes,
}


def check_suites(names: tuple[str, ...]) -> None:
    """Raises ValueError for a suite that does not exist."""
    for name in names:
        if name not in SUITES:
            raise ValueError(f"evaluation suite {name!r} is not one of {sorted(SUITES)}")


def evaluate(
    engine: Engine, names: tuple[str, ...], samples: Path, report: Callable[[str], None]
) -> dict:
    """Runs the suites; one flat dict of their metrics, after the number of parameters."""
    samples.mkdir(parents=True, exist_ok=True)
    metrics = {"parameters": sum(x.size for x in jax.tree.leaves(engine.parameters))}
    for name in names:
        report(f"evaluating: {name}")
        metrics |= SUITES[name](engine, samples)
    return metrics
