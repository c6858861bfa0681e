"""The paper's settings by name."""

from dataclasses import replace

from transfusion_jax.config.diffusion import SamplerConfig
from transfusion_jax.config.experiment import Experiment
from transfusion_jax.config.model import ImageConfig, ModelConfig

TABLE_2 = {
    "0.16B": dict(layers=16, width=768, heads=12),
    "0.37B": dict(layers=24, width=1024, heads=16),
    "0.76B": dict(layers=24, width=1536, heads=24),
    "1.4B": dict(layers=24, width=2048, heads=16),
    "7B": dict(layers=32, width=4096, heads=32),
}


def paper(size: str) -> Experiment:
    """The paper's controlled setting (section 4.1) at one of the sizes of Table 2, linear 2x2
    patches."""
    return Experiment(
        name=f"transfusion_{size}",
        model=ModelConfig(**TABLE_2[size]),
        # Room for an image of 1x1 patches, or of codes, and a caption.
        sampler=SamplerConfig(max_tokens=1152),
    )


def unet(size: str) -> Experiment:
    """`paper(size)` with the halves of a U-Net instead of linear layers (section 4.3)."""
    base = paper(size)
    model = replace(base.model, patch_encoder="unet")
    return replace(base, name=f"transfusion_unet_{size}", model=model)


def llama(size: str) -> Experiment:
    """The text-only baseline: the same transformer on the same text."""
    base = paper(size)
    model = replace(base.model, family="llama", image_attention="causal")
    return replace(base, name=f"llama_{size}", model=model)


def chameleon(size: str) -> Experiment:
    """The baseline with images as 32x32 codes of a VQ autoencoder, and Chameleon's stability
    changes."""
    base = stabilised(paper(size))
    model = replace(base.model, family="chameleon", image_attention="causal")
    image = ImageConfig(height=32, width=32, channels=1, patch=1, codes=16_384)
    return replace(base, name=f"chameleon_{size}", model=model, image=image)


def stabilised(base: Experiment) -> Experiment:
    """An experiment with Chameleon's changes for stability: norms of queries and keys, norms after
    layers, the z-loss, and a peak learning rate of 1e-4. The final rate stays a twentieth of the
    peak (our choice; the paper is silent)."""
    return replace(
        base,
        model=replace(base.model, qk_norm=True, norm_placement="post"),
        optimizer=replace(base.optimizer, learning_rate=1e-4, final_learning_rate=5e-6),
        train=replace(base.train, z_loss=1e-5),
    )
