"""Your own pictures, captions and text: copy this file, name your data, change what you like.

    transfusion-jax prepare my/folder --out data/mine --height 32 --width 32
    transfusion-jax train experiments/own_data.py

docs/data.md says more.
Hardware: two CPU cores; not timed, but `emoji.py`, a model of this size, took 0.8 s a step.
Expected: a model of 3.5 M parameters that draws the colours that captions name, and few forms.
"""

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SourceConfig,
    TrainConfig,
)
from transfusion_jax.data.sources.dataset import open_dataset

DATA = "data/mine"


def config() -> Experiment:
    dataset = open_dataset(DATA)
    image = dataset.image_config(patch=4)
    return Experiment(
        name="own_data",
        image=image,
        model=ModelConfig(
            layers=4,
            width=192,
            heads=4,
            mlp_width=512,
            vocab_size=dataset.embedding_rows,
            compute_dtype="float32",
            timestep="after",
            patch_position="learned",
        ),
        diffusion=DiffusionConfig(noise_limit=500),
        data=DataConfig(
            sources=(SourceConfig(DATA),),
            row_length=dataset.row_length(image, images=4),
            batch_rows=8,
            max_epochs=100.0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100),
        train=TrainConfig(steps=1000, ema_decay=0.995, checkpoint_every=250),
        sampler=SamplerConfig(
            kind="ddim",
            steps=50,
            guidance=3.0,
            clip=1.0,
            context_timestep=50,
            max_tokens=image.span + 64,
        ),
        evaluation=("likelihood", "pairs"),
    )
