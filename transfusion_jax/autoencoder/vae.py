"""The convolutional autoencoder of Esser et al. (2021, arXiv 2012.09841), Gaussian or quantised.

Attributes have the names of diffusers' `AutoencoderKL`, the layout of published weights;
`published.py` lists the few that differ. Images and latents are [B, height, width, channels] in
float32; `jax.default_matmul_precision` sets the precision of products. Parameters are small beside
activations, so a mesh replicates them and cuts the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.autoencoder.layers import Attention, Conv, GroupNorm, ResidualBlock
from transfusion_jax.autoencoder.quantizer import Quantizer

LAST_KERNEL = ("decoder", "conv_out", "kernel")
"""Path of the decoder's last kernel, whose gradients weigh the GAN term (Esser et al., eq. 7)."""


class Gaussian(NamedTuple):
    """A normal distribution over latents with diagonal covariance; both arrays are [B, h, w, z]."""

    mean: Array
    log_variance: Array

    def sample(self, key: Array) -> Array:
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Array:
        """KL divergence from the standard normal, [B], in nats (Kingma & Welling 2014, app. B)."""
        element = self.mean**2 + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * jnp.sum(element, axis=(1, 2, 3))


class MiddleBlock(nnx.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    def __init__(self, width: int, groups: int, attention: bool, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResidualBlock(width, width, groups, rngs=rngs) for _ in range(2))
        self.attention = Attention(width, groups, rngs=rngs) if attention else None

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = self.resnets[0](x_Bhwc)
        if self.attention is not None:
            x_Bhwc = self.attention(x_Bhwc)
        return self.resnets[1](x_Bhwc)


class DownBlock(nnx.Module):
    """The encoder's blocks at one resolution, then a strided convolution if it halves."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: AutoencoderConfig,
        attention: bool,
        halve: bool,
        *,
        rngs: nnx.Rngs,
    ):
        widths = (inputs, *(outputs,) * (config.blocks - 1))
        self.resnets = nnx.List(
            ResidualBlock(width, outputs, config.groups, rngs=rngs) for width in widths
        )
        self.attentions = nnx.List(
            Attention(outputs, config.groups, rngs=rngs) for _ in self.resnets if attention
        )
        self.downsample = Conv(outputs, outputs, stride=2, rngs=rngs) if halve else None

    def __call__(self, x_Bhwc: Array) -> Array:
        for i, block in enumerate(self.resnets):
            x_Bhwc = block(x_Bhwc)
            if self.attentions:
                x_Bhwc = self.attentions[i](x_Bhwc)
        return x_Bhwc if self.downsample is None else self.downsample(x_Bhwc)


class UpBlock(nnx.Module):
    """The decoder's blocks at one resolution, then nearest-neighbour upsampling and a convolution
    if it doubles."""

    def __init__(
        self, inputs: int, outputs: int, config: AutoencoderConfig, double: bool, *, rngs: nnx.Rngs
    ):
        widths = (inputs, *(outputs,) * config.blocks)
        self.resnets = nnx.List(
            ResidualBlock(width, outputs, config.groups, rngs=rngs) for width in widths
        )
        self.upsample = Conv(outputs, outputs, rngs=rngs) if double else None

    def __call__(self, x_Bhwc: Array) -> Array:
        for block in self.resnets:
            x_Bhwc = block(x_Bhwc)
        if self.upsample is None:
            return x_Bhwc
        return self.upsample(jnp.repeat(jnp.repeat(x_Bhwc, 2, axis=1), 2, axis=2))


class Encoder(nnx.Module):
    """Images [B, H, W, channels] -> [B, h, w, outputs]."""

    def __init__(self, config: AutoencoderConfig, outputs: int, *, rngs: nnx.Rngs):
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = Conv(config.channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                config,
                attention=config.encoder_attention and i == last,
                halve=i < last,
                rngs=rngs,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MiddleBlock(widths[-1], config.groups, config.middle_attention, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.groups)
        self.conv_out = Conv(widths[-1], outputs, rngs=rngs)

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = self.conv_in(x_Bhwc)
        for block in self.down_blocks:
            x_Bhwc = block(x_Bhwc)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x_Bhwc))))


class Decoder(nnx.Module):
    """Latents [B, h, w, z] -> images [B, H, W, channels]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        last = len(widths) - 1
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MiddleBlock(widths[0], config.groups, config.middle_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(widths[max(i - 1, 0)], width, config, double=i < last, rngs=rngs)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.groups)
        self.conv_out = Conv(widths[-1], config.channels, rngs=rngs)

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = self.mid_block(self.conv_in(x_Bhwc))
        for block in self.up_blocks:
            x_Bhwc = block(x_Bhwc)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x_Bhwc)))


class Autoencoder(nnx.Module):
    """Maps images in [-1, 1], with sides that `config.downsampling` divides, to latents and back.

    The latent to `decode` is `encode(image).sample(key)` for kind "kl", and
    `quantizer(features(image)).latent` for kind "vq".
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        z = config.latent_channels
        outputs = 2 * z if config.kind == "kl" else z
        self.encoder = Encoder(config, outputs, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(outputs, outputs, 1, rngs=rngs) if config.latent_projection else None
        self.post_quant_conv = Conv(z, z, 1, rngs=rngs) if config.latent_projection else None
        self.quantizer = Quantizer(config.codes, z, rngs=rngs) if config.kind == "vq" else None
        self.config = config

    def features(self, image_BHWC: Array) -> Array:
        """The encoder's output: mean and log variance, [B, h, w, 2 z], for kind "kl"; the latent
        before quantisation, [B, h, w, z], for "vq"."""
        x_Bhwc = self.encoder(image_BHWC)
        return x_Bhwc if self.quant_conv is None else self.quant_conv(x_Bhwc)

    def encode(self, image_BHWC: Array) -> Gaussian:
        """The posterior of a "kl" autoencoder, with log variances clipped to [-30, 20]."""
        assert self.config.kind == "kl"
        mean, log_variance = jnp.split(self.features(image_BHWC), 2, axis=-1)
        return Gaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latent_Bhwz: Array) -> Array:
        """Images [B, H, W, channels], not clipped."""
        if self.post_quant_conv is not None:
            latent_Bhwz = self.post_quant_conv(latent_Bhwz)
        return self.decoder(latent_Bhwz)


def build(config: AutoencoderConfig, seed: int | Array) -> Autoencoder:
    """A freshly initialised autoencoder."""
    return Autoencoder(config, rngs=nnx.Rngs(params=seed))


def abstract_autoencoder(config: AutoencoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph, and the parameters as shapes with logical axis names; nothing is allocated."""
    return jax.eval_shape(lambda: nnx.split(build(config, 0), nnx.Param))
