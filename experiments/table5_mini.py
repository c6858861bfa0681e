"""Table 5 on digits: attention among the patches of an image, causal or bidirectional.

    transfusion-jax sweep experiments/table5_mini.py

Hardware: two CPU cores, a quarter of an hour with two points at a time: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from digits import config as digits

from transfusion_jax.config import Experiment, SourceConfig


def base() -> Experiment:
    """The digits without their tasks of text alone, with the paper's optimizer."""
    whole = digits()
    return replace(
        whole,
        data=replace(whole.data, sources=(SourceConfig("digits"),)),
        optimizer=replace(whole.optimizer, kind="adamw"),
        train=replace(whole.train, steps=1000),
        evaluation=("digits", "likelihood"),
    )


def sweep() -> Iterator[Experiment]:
    small = base()
    for attention in ("causal", "bidirectional"):
        for seed in (0, 1):
            yield replace(
                small,
                name=f"{attention}_{seed}",
                model=replace(small.model, image_attention=attention),
                train=replace(small.train, seed=seed),
            )
