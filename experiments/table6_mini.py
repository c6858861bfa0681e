"""Table 6 on digits: the size of a linear patch, at equal numbers of tokens, as in the paper.

    transfusion-jax sweep experiments/table6_mini.py

Hardware: two CPU cores, 25 minutes with two points at a time: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from table5_mini import base

from transfusion_jax.config import Experiment


def sweep() -> Iterator[Experiment]:
    small = base()
    for patch in (1, 2, 4):
        image = replace(small.image, patch=patch)
        sampler = replace(small.sampler, max_tokens=image.span + 32)
        for seed in (0, 1):
            yield replace(
                small,
                name=f"patch_{patch}_{seed}",
                image=image,
                sampler=sampler,
                train=replace(small.train, seed=seed),
            )
