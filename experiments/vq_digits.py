"""A VQ autoencoder of the digits: 8x8 grey pictures as 4x4 codes of 64, for a small Chameleon.

    transfusion-jax autoencoder experiments/vq_digits.py

Its data is what experiments/table3_mini.py prepares first.
Hardware: two CPU cores.
"""

from transfusion_jax.autoencoder.config import (
    AutoencoderConfig,
    AutoencoderExperiment,
    AutoencoderTrainConfig,
    LossConfig,
)
from transfusion_jax.config import OptimizerConfig


def config() -> AutoencoderExperiment:
    return AutoencoderExperiment(
        name="vq_digits",
        data="data/digits",
        model=AutoencoderConfig(
            size=8,
            channels=1,
            latent_channels=4,
            width=32,
            multipliers=(1, 2),
            groups=8,
            blocks=1,
            middle_attention=False,
            encoder_attention=False,
            kind="vq",
            codes=64,
        ),
        loss=LossConfig(lpips=0.0, gan=0.0, identity=0.0, revive_codes=True),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            final_learning_rate=1e-4,
            warmup_steps=30,
            b1=0.9,
            b2=0.99,
            weight_decay=0.0,
        ),
        train=AutoencoderTrainConfig(
            steps=2000, batch=64, ema_decay=0.99, checkpoint_every=1000, sample_every=1000
        ),
    )
