"""Your own text, without pictures: a small language model. `own_data.py` is for pictures and text.

    transfusion-jax prepare my/texts --out data/text --vocab-size 2000 --held-out 0.1
    transfusion-jax train experiments/own_text.py
    transfusion-jax generate runs/own_text --prompt "Once upon a time" --out out/text

Hardware: two CPU cores; 1,000 steps of 2,048 tokens.
Expected: a model of 1.4 M parameters with a vocabulary of 2,000 pieces, and its perplexity of the
texts that are held out, if any are.
"""

from transfusion_jax.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SourceConfig,
    TrainConfig,
)
from transfusion_jax.data.sources.dataset import open_dataset

DATA = "data/text"


def config(data: str = DATA) -> Experiment:
    return Experiment(
        name="own_text",
        model=ModelConfig(
            family="llama",
            image_attention="causal",
            layers=4,
            width=128,
            heads=4,
            mlp_width=384,
            vocab_size=open_dataset(data).embedding_rows,
            compute_dtype="float32",
            remat="minimal",
        ),
        data=DataConfig(
            sources=(SourceConfig(data),), row_length=256, batch_rows=8, max_epochs=200.0
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=2e-3, final_learning_rate=1e-4, warmup_steps=100
        ),
        train=TrainConfig(steps=1000, ema_decay=0.998, checkpoint_every=250),
        sampler=SamplerConfig(max_tokens=200),
        evaluation=("likelihood",),
    )
