"""Exact answers to comparisons, those of training and those held out apart."""

from transfusion_jax.data.sources.comparisons import problems
from transfusion_jax.generation.engine import Engine


def comparisons(engine: Engine) -> dict:
    """`comparison_accuracy`, `comparison_accuracy_held_out`: share of prompts answered exactly right.

    One of the two numbers, at random, is right for half of them.
    """
    return {
        "comparison_accuracy": _accuracy(engine, problems("train")),
        "comparison_accuracy_held_out": _accuracy(engine, problems("held_out")),
    }


def _accuracy(engine: Engine, asked: list[tuple[str, str]]) -> float:
    answers = engine.using(temperature=0.0).generate([(prompt,) for prompt, _ in asked])
    right = [spans == [answer] for spans, (_, answer) in zip(answers, asked, strict=True)]
    return sum(right) / len(right)
