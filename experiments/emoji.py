"""Emoji and speeches: real colour pictures with real captions, and real text, from the files on.

    python experiments/fetch_emoji.py data/raw
    transfusion-jax prepare data/raw/speeches --out data/speeches --vocab-size 4000 --held-out 0.05
    transfusion-jax prepare data/raw/emoji --out data/emoji --height 32 --width 32 --held-out 0.02 \
        --tokenizer data/speeches/tokenizer.model
    transfusion-jax train experiments/emoji.py

Hardware: two CPU cores, 20 minutes.
Expected: held-out text perplexity 121; blotches of about the right colours; captions that tell
flags from people.
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

PICTURES, TEXT = "data/emoji", "data/speeches"


def config() -> Experiment:
    pictures = open_dataset(PICTURES)
    image = pictures.image_config(patch=4)
    return Experiment(
        name="emoji",
        image=image,
        model=ModelConfig(
            layers=4,
            width=192,
            heads=4,
            mlp_width=512,
            vocab_size=pictures.embedding_rows,
            compute_dtype="float32",
            timestep="after",
            patch_position="learned",
            rope_theta=1000.0,
        ),
        diffusion=DiffusionConfig(noise_limit=500),
        data=DataConfig(
            sources=(SourceConfig(PICTURES, 4.0), SourceConfig(TEXT, 1.0)),
            row_length=4 * image.span + 88,
            batch_rows=8,
            max_epochs=100.0,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=5e-5, warmup_steps=200),
        train=TrainConfig(steps=1500, ema_decay=0.998, checkpoint_every=250),
        sampler=SamplerConfig(
            "ddim", steps=50, clip=1.0, context_timestep=20, max_tokens=image.span + 64
        ),
        evaluation=("likelihood", "pairs"),
    )
