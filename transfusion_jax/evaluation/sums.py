"""Exact completion of sums, those trained on and those held out apart."""

from transfusion_jax.data.sources.sums import problems
from transfusion_jax.generation.engine import Engine


def sums(engine: Engine) -> dict:
    """`text_accuracy`, `text_accuracy_held_out`: share of prompts continued with exactly the right answer."""
    return {
        f"text_accuracy{suffix}": _accuracy(engine, problems(split))
        for split, suffix in (("train", ""), ("held_out", "_held_out"))
    }


def _accuracy(engine: Engine, asked: list[tuple[str, str]]) -> float:
    spans = engine.using(temperature=0.0).generate([(prompt,) for prompt, _ in asked])
    return sum(s == [answer] for s, (_, answer) in zip(spans, asked, strict=True)) / len(asked)
