"""One autoencoder experiment as frozen, typed data, in the style of `transfusion_jax.config`.

Defaults follow Transfusion (arXiv 2408.11039, section 4.1 and appendix): the CNN of Esser et al.
(2021, arXiv 2012.09841) maps 256x256 pixels to 32x32 latents with 8 channels, and the loss is
L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transfusion_jax.config import MeshConfig, OptimizerConfig, ProcessesConfig
from transfusion_jax.config.fields import require_finite, require_seed, require_types
from transfusion_jax.errors import require


@dataclass(frozen=True)
class AutoencoderConfig:
    """The network: residual blocks at `len(multipliers)` resolutions, each half the last."""

    size: int = 256
    """Side of the square training pictures, in pixels.

    A trained autoencoder encodes any height and width that are multiples of `downsampling`.
    """
    channels: int = 3
    """Channels of a picture: 3 is RGB, 1 is grey."""
    latent_channels: int = 8
    """Values at each place of the latent grid."""
    width: int = 128
    """Channels per unit of `multipliers`."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels at each resolution, full resolution first, in units of `width`."""
    groups: int = 32
    """Groups of each group norm; layers with fewer channels normalise each channel separately."""
    blocks: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more at each."""
    middle_attention: bool = True
    """Self-attention between the two middle blocks, over the latent grid."""
    encoder_attention: bool = True
    """Self-attention after each block at the encoder's lowest resolution.

    Esser et al.'s code offers it as `attn_resolutions`, for encoder and decoder together; Stable
    Diffusion uses it in neither. Transfusion gives only the total, 86 M parameters. Attention in
    the encoder alone comes nearest: 85.8 M, against 83.7 M in neither half and 89.0 M in both.
    """
    latent_projection: bool = True
    """1x1 convolutions after the encoder and before the decoder.

    Diffusers calls them `quant_conv` and `post_quant_conv`; Stable Diffusion 3 and FLUX have none.
    """
    kind: Literal["kl", "vq"] = "kl"
    """`kl`: a Gaussian latent (VAE); `vq`: a quantised one (VQ-VAE)."""
    codes: int = 16_384
    """Codebook entries of a `vq` autoencoder, each with `latent_channels` values."""

    def __post_init__(self):
        for name in ("size", "channels", "latent_channels", "width", "groups", "blocks", "codes"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        require(
            min(self.multipliers, default=0) > 0,
            f"model.multipliers={self.multipliers} must be positive, and at least one",
        )
        require(
            self.size % self.downsampling == 0,
            f"model.size={self.size} must be a multiple of {self.downsampling}, the downsampling "
            f"of the {len(self.multipliers)} resolutions in model.multipliers={self.multipliers}",
        )
        require(
            all(width % min(self.groups, width) == 0 for width in self.widths),
            f"model.groups={self.groups} must divide the channels of each resolution, "
            f"{self.widths}",
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, full resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.multipliers) - 1)


def tiny(kind: Literal["kl", "vq"] = "kl") -> AutoencoderConfig:
    """From 32x32 pixels to 8x8 latents with 4 channels; 0.25 M parameters train on a CPU core."""
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
    """Weights and settings of the loss terms; weight 0 switches a term off."""

    l1: float = 1.0
    """Weight of the mean absolute error of the pixels."""
    lpips: float = 1.0
    """Weight of the perceptual distance LPIPS (Zhang et al. 2018)."""
    lpips_network: Literal["vgg16", "alexnet"] = "vgg16"
    """VGG16 is the usual choice; AlexNet costs a fiftieth of it, for small machines."""
    gan: float = 0.5
    """Weight of the adversarial term, relative to the size of the others' gradients."""
    gan_start: int = 50_000
    """First step at which the discriminator trains and its term counts."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Strided layers of the patch discriminator (Isola et al. 2017); 3 give patches of 70x70."""
    identity: float = 0.2
    """Weight of the distance between features of a self-supervised ResNet-50 (MoCo v2)."""
    identity_weights: str = ""
    """The ResNet-50, a safetensors file; without it training warns and omits the term."""
    kl: float = 1e-6
    """Weight of the KL divergence of the latents from a unit Gaussian."""
    commitment: float = 0.25
    """Beta of a `vq` autoencoder, whose codebook and commitment losses replace the KL term."""
    revive_codes: bool = False
    """Move unused codes to latents of the batch."""
    revive_every: int = 100
    """Steps between revivals; a code not used since the last one is moved."""

    def __post_init__(self):
        for name in ("l1", "lpips", "gan", "identity", "kl", "commitment"):
            value = getattr(self, name)
            require(value >= 0, f"loss.{name}={value} must not be negative")
        for name in ("discriminator_width", "discriminator_layers", "revive_every"):
            require(getattr(self, name) > 0, f"loss.{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """Length of the training, and how often it logs, saves and draws."""

    steps: int = 1_000_000
    """Steps of the whole run."""
    batch: int = 256
    """Pictures per step."""
    seed: int = 0
    """Of weights, data order and latent samples."""
    ema_decay: float = 0.9999
    """Of the average of the weights, which is what is measured and saved for use."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Latest checkpoints to keep."""
    failed_save: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be saved does to the run: "continue" with training (the next
    one may succeed), or "stop"."""
    sample_every: int = 1000
    """Steps between written grids of reconstructions."""
    max_skipped_steps: int = 10
    """Training stops after this many consecutive steps with a non-finite loss or gradient."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
            "max_skipped_steps",
        ):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1)")


@dataclass(frozen=True)
class AutoencoderExperiment:
    """Everything that varies between two runs that train an autoencoder."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (
        "mesh.",
        "processes.",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.failed_save",
        "train.max_skipped_steps",
        "train.sample_every",
    )
    """Prefixes of the fields that may change when a run is resumed."""

    name: str
    """Names the run directory, `runs/<name>`, and a point of a sweep."""
    data: str = "scenes"
    """A built-in source with pictures, or a directory of data prepared as raw pixels."""
    model: AutoencoderConfig = AutoencoderConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=1e-4, final_learning_rate=1e-5, b1=0.5, b2=0.9
    )
    train: AutoencoderTrainConfig = AutoencoderTrainConfig()
    mesh: MeshConfig = MeshConfig()
    processes: ProcessesConfig = ProcessesConfig()

    def __post_init__(self):
        require_types(self)
        require_finite(self)
        require_seed(self.train.seed)
        layers, size = self.loss.discriminator_layers, self.model.size
        require(
            not self.loss.gan or self.loss.gan_start >= self.train.steps or size >> layers >= 3,
            f"model.size={size}: the discriminator's loss.discriminator_layers={layers} leave "
            f"nothing of pictures of less than {3 << layers} pixels; loss.gan=0 goes without",
        )
