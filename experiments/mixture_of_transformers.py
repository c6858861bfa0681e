"""Mixture-of-Transformers against the dense model, at equal FLOPs (Liang et al. 2024, arXiv
2411.04996).

    transfusion-jax sweep experiments/mixture_of_transformers.py

Digits, sums and comparisons; each with two seeds. A position of the mixture multiplies as many
weights as one of the dense model, so a step has the same FLOPs; in all it has nearly twice as many.
Hardware: two CPU cores, ten minutes for a dense point, a third more for a mixture, by their steps;
run on an H100 in 80 seconds of training each, six points at a time: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from digits import config as digits

from transfusion_jax.config import Experiment


def sweep() -> Iterator[Experiment]:
    base = digits()
    for name, experts in (("dense", "shared"), ("mixture", "modality")):
        for seed in (0, 1):
            yield replace(
                base,
                name=f"{name}_{seed}",
                model=replace(base.model, experts=experts),
                optimizer=replace(base.optimizer, kind="adamw"),
                train=replace(base.train, steps=2000, seed=seed),
            )
