"""Suite `comparisons`: exact answers to comparisons, those of training and those held out apart."""

from pathlib import Path

from transfusion_jax.data.sources.comparisons import problems
from transfusion_jax.evaluation.sums import exact_share
from transfusion_jax.generation.engine import Engine


def comparisons(engine: Engine, samples: Path, rows: int | None) -> dict:
    """`comparison_accuracy`, `comparison_accuracy_held_out`: share of prompts answered exactly.

    A model that answers with one of the two numbers at random is right for half of them; one that
    knows only which numbers exceed ten, and else answers with the first, for 81.0 % of those held
    out.
    """
    return {
        "comparison_accuracy": exact_share(engine, problems("train")),
        "comparison_accuracy_held_out": exact_share(engine, problems("held_out")),
    }
