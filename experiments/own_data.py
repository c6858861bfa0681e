"""Your own pictures, captions and text: copy this file, name your data, change what you like.

    transfusion-jax prepare my/folder --out data/mine --height 32 --width 32
    transfusion-jax train experiments/own_data.py

docs/data.md says more. The settings are those that made `scenes.py` draw (docs/log.md).
Hardware: two CPU cores; `emoji.py`, a model of this size, took 20 minutes.
Expected: a model of 2 M parameters that learns some thousand pictures (docs/data.md).
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


def config(data: str = DATA) -> Experiment:
    dataset = open_dataset(data)
    # A picture of few, large patches: a small model sees more pictures, and draws better.
    height, width, _ = dataset.image_shape
    sides = range(1, max(min(height, width) // 4, 1) + 1)
    image = dataset.image_config(max(n for n in sides if height % n == width % n == 0))
    return Experiment(
        name="own_data",
        image=image,
        model=ModelConfig(
            layers=4,
            width=128,
            heads=4,
            mlp_width=384,
            vocab_size=dataset.embedding_rows,
            compute_dtype="float32",
            timestep="after",
            patch_position="learned",
            rope_theta=100.0,
            remat="minimal",
        ),
        # The picture itself is predicted, mostly from much noise: that is where captions count.
        diffusion=DiffusionConfig(
            prediction="x",
            loss="x",
            snr_scale=0.1,
            timesteps="logit_normal",
            timestep_mean=0.5,
            timestep_std=0.8,
            noise_limit=200,
        ),
        data=DataConfig(
            sources=(SourceConfig(data),),
            row_length=dataset.row_length(image, images=6),
            batch_rows=8,
            image_first=0.4,
            max_epochs=200.0,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=100
        ),
        train=TrainConfig(
            steps=2800, image_loss_weight=50.0, ema_decay=0.998, checkpoint_every=250
        ),
        sampler=SamplerConfig(
            kind="ddim",
            steps=50,
            guidance=2.0,
            clip=1.0 if dataset.stored == "pixels" else SamplerConfig.clip,
            context_timestep=30,
            max_tokens=image.span + 64,
        ),
        evaluation=("likelihood", "pairs"),
    )
