"""Table 7 on digits: linear patches and U-Net patches, at two widths of the transformer.

    transfusion-jax sweep experiments/table7_mini.py

Hardware: two CPU cores, 35 minutes with two points at a time: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from table5_mini import base

from transfusion_jax.config import Experiment

UNET = dict(patch_encoder="unet", unet_widths=(16, 32), unet_blocks=1, timestep="before")


def sweep() -> Iterator[Experiment]:
    small = base()
    for width in (64, 128):
        for encoder, changes in (("linear", {}), ("unet", UNET)):
            model = replace(small.model, width=width, mlp_width=3 * width, **changes)
            for seed in (0, 1):
                yield replace(
                    small,
                    name=f"{encoder}_{width}_{seed}",
                    model=model,
                    train=replace(small.train, seed=seed),
                )
