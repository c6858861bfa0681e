"""Scenes for an hour on two cores: wider than scenes.py, with two and a half times the steps.

    transfusion-jax train experiments/scenes_hour.py

Hardware: two CPU cores; 2.0e14 FLOPs. 106 minutes of training beside other work, 66 with little
beside it.
Expected: what is asked for drawn in 90 % of prompts (68 % with one image each), in 93 % of those
with pairs of colour and kind never seen in training, captions 95 %: docs/scenes.md. That run was
before captions had more relations (`words.RELATED`).
"""

from dataclasses import replace

from scenes import config as scenes

from transfusion_jax.config import Experiment


def config() -> Experiment:
    base = scenes()
    return replace(
        base,
        name="scenes_hour",
        model=replace(base.model, width=128, mlp_width=384),
        data=replace(base.data, image_first=0.4),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        train=replace(base.train, steps=16_000),
    )
