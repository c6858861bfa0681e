"""Scenes: draws coloured shapes from captions, describes and edits them, under an exact judge.

    transfusion-jax train experiments/scenes.py

Hardware: two CPU cores; 1.2e14 FLOPs, about twenty minutes of training with nothing beside it.
Expected: it reads and does not yet draw what is asked. Captions 57 % (of pairs of colour and kind
never seen in training, 17 %); drawings have clean shapes, 3 % of them those of the caption; edits
0 %. docs/log.md says what was tried.
"""

from dataclasses import replace

from digits import config as digits

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    SourceConfig,
)


def config() -> Experiment:
    base = digits()
    return replace(
        base,
        name="scenes",
        image=ImageConfig(height=32, width=32, channels=3, patch=4),
        model=replace(base.model, width=192, mlp_width=512, attention_block=192),
        diffusion=DiffusionConfig(prediction="x", loss="v", noise_limit=500),
        # Half of the pairs come image first: reading is what is learned last.
        data=DataConfig(
            sources=(SourceConfig("scenes"),),
            row_length=192,
            batch_rows=12,
            image_first=0.5,
            max_epochs=100.0,
        ),
        train=replace(
            base.train, steps=4500, vocab_chunk=192, ema_decay=0.998, checkpoint_every=500
        ),
        sampler=replace(base.sampler, kind="ddim", max_tokens=160),
        evaluation=("scenes",),
    )
