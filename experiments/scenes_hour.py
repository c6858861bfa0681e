"""Scenes for an hour on two cores: the model of scenes.py with three and a half times the steps.

    transfusion-jax train experiments/scenes_hour.py

Hardware: two CPU cores; 1.6e14 FLOPs, an hour.
"""

from dataclasses import replace

from scenes import config as scenes

from transfusion_jax.config import Experiment


def config() -> Experiment:
    base = scenes()
    return replace(
        base,
        name="scenes_hour",
        # In so many steps reading is learned from fewer pairs, so more are left to draw.
        data=replace(base.data, image_first=0.25),
        train=replace(base.train, steps=22_500),
    )
