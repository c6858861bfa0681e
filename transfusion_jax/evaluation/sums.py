"""Suite `sums`: exact completion of sums, those of training and those held out apart."""

from collections.abc import Sequence
from pathlib import Path

from transfusion_jax.data.sources.sums import problems
from transfusion_jax.evaluation.answers import only_text
from transfusion_jax.generation.engine import Engine


def sums(engine: Engine, samples: Path, rows: int | None) -> dict:
    """`text_accuracy`, `text_accuracy_held_out`: share of prompts answered exactly right.

    The best constant answer is right for 15.4 % of those held out.
    """
    return {
        "text_accuracy": exact_share(engine, problems("train")),
        "text_accuracy_held_out": exact_share(engine, problems("held_out")),
    }


def exact_share(engine: Engine, asked: Sequence[tuple[str, str]]) -> float:
    """Share of the (prompt, answer) whose answer comes, to the letter and alone."""
    answers = engine.using(temperature=0.0).generate([(prompt,) for prompt, _ in asked])
    right = [only_text(spans) == answer for spans, (_, answer) in zip(answers, asked, strict=True)]
    return sum(right) / len(right)
