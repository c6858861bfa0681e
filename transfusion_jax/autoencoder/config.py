"""One autoencoder experiment as frozen, typed data, with the habits of `transfusion_jax.config`.

Defaults are the recipe of Transfusion (arXiv 2408.11039, section 4.1 and appendix): the CNN of Esser et al. (2021,
arXiv 2012.09841) from 256x256 pixels to 32x32 latents of 8 channels, L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL.
"""

from dataclasses import dataclass
from typing import Literal

from transfusion_jax.config import MeshConfig, OptimizerConfig
from transfusion_jax.errors import require


@dataclass(frozen=True)
class AutoencoderConfig:
    """The network: residual blocks at `len(multipliers)` resolutions, each half the one before."""

    size: int = 256
    """Side of the square pictures it is trained on, in pixels; it encodes any that `downsampling` divides."""
    channels: int = 3
    latent_channels: int = 8
    width: int = 128
    """The unit of `multipliers`: channels at full resolution, where the first of them is 1."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels at each resolution, in units of `width`."""
    groups: int = 32
    """Groups of channels that are normalised together; every channel by itself where there are fewer."""
    blocks: int = 2
    """Residual blocks of each resolution in the encoder; the decoder has one more."""
    middle_attention: bool = True
    """Self-attention over the latent grid between the two middle blocks."""
    encoder_attention: bool = True
    """Self-attention after each block of the encoder's lowest resolution.

    Esser et al.'s code can have it (`attn_resolutions`), in encoder and decoder alike; Stable Diffusion has it in
    neither. Transfusion gives only the total, 86 M parameters, which having it in the encoder alone comes nearest to:
    85.8 M, against 83.7 M in neither and 89.0 M in both.
    """
    latent_projection: bool = True
    """1x1 convolutions on both sides of the latent (`quant_conv`; Stable Diffusion 3 and FLUX have none)."""
    kind: Literal["kl", "vq"] = "kl"
    codes: int = 16_384
    """Entries of the codebook of a "vq" autoencoder; their width is `latent_channels`."""

    def __post_init__(self):
        sizes = (
            self.size,
            self.channels,
            self.latent_channels,
            self.width,
            self.groups,
            self.blocks,
            self.codes,
        )
        require(
            min(*sizes, *self.multipliers, len(self.multipliers)) > 0,
            f"sizes must be positive: {self}",
        )
        require(
            self.size % self.downsampling == 0,
            f"model.size={self.size} must be a multiple of {self.downsampling}, which the {len(self.multipliers)} "
            "resolutions of model.multipliers reduce it by",
        )
        odd = [width for width in self.widths if width % min(self.groups, width)]
        require(
            not odd,
            f"model.groups={self.groups} must divide the channels of each resolution, {self.widths}",
        )
        require(self.kind in ("kl", "vq"), f"model.kind={self.kind!r} must be 'kl' or 'vq'")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, the full one first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels along each side of one latent."""
        return 2 ** (len(self.multipliers) - 1)


def tiny(kind: Literal["kl", "vq"] = "kl") -> AutoencoderConfig:
    """From 32x32 pixels to 8x8 latents of 4 channels, in 0.25 M parameters: learns on one CPU core."""
    return AutoencoderConfig(
        size=32,
        latent_channels=4,
        width=16,
        multipliers=(1, 2, 2),
        groups=8,
        blocks=1,
        kind=kind,
        codes=256,
    )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; 0 switches one off."""

    l1: float = 1.0
    lpips: float = 1.0
    lpips_network: Literal["vgg16", "alexnet"] = "vgg16"
    """VGG16 is what autoencoders are trained with; AlexNet costs one fiftieth and is for small machines."""
    gan: float = 0.5
    gan_start: int = 50_000
    """Step from which the discriminator trains and its term counts."""
    discriminator_width: int = 64
    discriminator_layers: int = 3
    """Of the patch discriminator (Isola et al. 2017): each layer halves the picture; 3 make patches of 70 pixels."""
    identity: float = 0.2
    """Distance of the features of a self-supervised ResNet-50 (MoCo v2)."""
    identity_weights: str = ""
    """Its weights, a safetensors file; without one, training says so and goes on without the term."""
    kl: float = 1e-6
    commitment: float = 0.25
    """Beta of the codebook loss, which takes the place of the KL term."""
    revive_codes: bool = False
    """Move codes that are not used to latents of the batch."""
    revive_every: int = 100
    """Steps in which a code must be used to stay where it is."""

    def __post_init__(self):
        for name in ("l1", "lpips", "gan", "identity", "kl", "commitment"):
            require(
                getattr(self, name) >= 0, f"loss.{name}={getattr(self, name)} must not be negative"
            )
        for name in ("discriminator_width", "discriminator_layers", "revive_every"):
            require(getattr(self, name) > 0, f"loss.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    steps: int = 1_000_000
    batch: int = 256
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    sample_every: int = 1000
    """Steps between pictures of reconstructions."""
    max_skipped_steps: int = 10

    def __post_init__(self):
        names = (
            "steps",
            "batch",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
        )
        for name in (*names, "max_skipped_steps"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1)")


@dataclass(frozen=True)
class AutoencoderExperiment:
    """Everything that varies between two trainings of an autoencoder."""

    name: str
    data: str = "scenes"
    """A source with pictures, by name, or the directory of data prepared as raw pixels."""
    model: AutoencoderConfig = AutoencoderConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, final_learning_rate=1e-5, b1=0.5, b2=0.9
    )
    train: AutoencoderTrainConfig = AutoencoderTrainConfig()
    mesh: MeshConfig = MeshConfig()
