"""Table 8 on digits: noise of pictures that come before their caption, limited or not.

    transfusion-jax sweep experiments/table8_mini.py

Hardware: two CPU cores, a quarter of an hour with two points at a time: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from table5_mini import base

from transfusion_jax.config import Experiment


def sweep() -> Iterator[Experiment]:
    small = base()
    for name, limit in (("no_limit", 0), ("limit", 500)):
        for seed in (0, 1):
            yield replace(
                small,
                name=f"{name}_{seed}",
                diffusion=replace(small.diffusion, noise_limit=limit),
                train=replace(small.train, seed=seed),
            )
