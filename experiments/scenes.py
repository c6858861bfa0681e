"""Scenes: draws coloured shapes from captions, describes and edits them, under an exact judge.

transfusion-jax train experiments/scenes.py
"""

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)


def config() -> Experiment:
    return Experiment(
        name="scenes",
        image=ImageConfig(height=32, width=32, channels=3, patch=4),
        model=ModelConfig(
            layers=4,
            width=192,
            heads=4,
            mlp_width=512,
            vocab_size=384,
            compute_dtype="float32",
            timestep="after",
            patch_position="learned",
            rope_theta=100.0,
        ),
        diffusion=DiffusionConfig(prediction="x", loss="v", noise_limit=500),
        data=DataConfig(
            sources=(SourceConfig("scenes"),), row_length=512, batch_rows=8, max_epochs=100.0
        ),
        tokenizer=TokenizerConfig(vocab_size=352),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=100),
        train=TrainConfig(steps=1200, vocab_chunk=512, ema_decay=0.995, checkpoint_every=1000),
        sampler=SamplerConfig(
            kind="ddim", steps=50, guidance=3.0, clip=1.0, context_timestep=50, max_tokens=160
        ),
        evaluation=("scenes",),
    )
