"""The convolutional autoencoder of Esser et al. (2021, arXiv 2012.09841), with a Gaussian or a quantised latent.

Modules and their attributes bear the names of diffusers' `AutoencoderKL`, the layout in which weights are published;
the few that differ are listed in `pretrained.py`. Images and latents are [B, height, width, channels]; all arrays are
float32, and products are as precise as `jax.default_matmul_precision` says. Parameters are few beside activations:
every device has all of them, and a mesh cuts the batch.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.autoencoder.quantizer import Quantizer
from transfusion_jax.model.layers import ones, parameter, project

LAST_KERNEL = ("decoder", "conv_out", "kernel")
"""Where `Autoencoder.last_kernel` lies in the parameters."""


class Gaussian(NamedTuple):
    """A normal distribution over latents, every element on its own; both arrays are [B, h, w, z]."""

    mean: Array
    log_variance: Array

    def sample(self, key: Array) -> Array:
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(
            key, self.mean.shape, self.mean.dtype
        )

    def kl(self) -> Array:
        """KL divergence from the standard normal, [B], in nats (Kingma & Welling 2014, appendix B)."""
        element = self.mean**2 + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * jnp.sum(element, axis=(1, 2, 3))


def zeros(width: int) -> nnx.Param:
    return nnx.Param(jnp.zeros((width,), jnp.float32), out_sharding=(None,), eager_sharding=False)


class Conv(nnx.Module):
    """A square convolution with bias: same padding, or one zero row and column after the end where it strides."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ):
        shape = (size, size, inputs, outputs)
        self.kernel = parameter(rngs.params(), shape, (None,) * 4, math.prod(shape[:3]) ** -0.5)
        self.bias = zeros(outputs)
        self.stride = stride
        self.padding = ((size // 2, size // 2) if stride == 1 else (0, 1),) * 2

    def __call__(self, x_Bhwc: Array) -> Array:
        layout = ("NHWC", "HWIO", "NHWC")
        y_Bhwc = jax.lax.conv_general_dilated(
            x_Bhwc, self.kernel[...], (self.stride,) * 2, self.padding, dimension_numbers=layout
        )
        return y_Bhwc + self.bias[...][None, None, None]


class Linear(nnx.Module):
    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = parameter(rngs.params(), (inputs, outputs), (None, None), inputs**-0.5)
        self.bias = zeros(outputs)

    def __call__(self, x_BLD: Array) -> Array:
        return project(x_BLD, self.kernel) + self.bias[...][None, None]


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over the grid and each group of channels (Wu & He 2018), epsilon 1e-6."""

    def __init__(self, width: int, groups: int):
        self.scale, self.bias = ones((width,), (None,)), zeros(width)
        self.groups = min(groups, width)

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = x_Bhwc - self._mean(x_Bhwc)
        x_Bhwc = x_Bhwc * jax.lax.rsqrt(self._mean(x_Bhwc * x_Bhwc) + 1e-6)
        return x_Bhwc * self.scale[...][None, None, None] + self.bias[...][None, None, None]

    def _mean(self, x_Bhwc: Array) -> Array:
        """Mean of a channel's group, [B, 1, 1, c]; over the grid first, which keeps channels the last dimension."""
        B, _, _, c = x_Bhwc.shape
        mean = jnp.mean(x_Bhwc, axis=(1, 2)).reshape(B, self.groups, c // self.groups)
        return jnp.broadcast_to(jnp.mean(mean, axis=2, keepdims=True), mean.shape).reshape(
            B, 1, 1, c
        )


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_Bhwc: Array) -> Array:
        y_Bhwc = self.conv1(jax.nn.silu(self.norm1(x_Bhwc)))
        y_Bhwc = self.conv2(jax.nn.silu(self.norm2(y_Bhwc)))
        return y_Bhwc + (x_Bhwc if self.conv_shortcut is None else self.conv_shortcut(x_Bhwc))


class Attention(nnx.Module):
    """Self-attention with one head over all places of the grid, added to its input."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            Linear(width, width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x_Bhwc: Array) -> Array:
        B, h, w, c = x_Bhwc.shape
        x_BLD = self.group_norm(x_Bhwc).reshape(B, h * w, c)
        logits_BLS = jnp.einsum("BLD,BSD->BLS", self.to_q(x_BLD) * c**-0.5, self.to_k(x_BLD))
        y_BLD = jnp.einsum("BLS,BSD->BLD", jax.nn.softmax(logits_BLS), self.to_v(x_BLD))
        return x_Bhwc + self.to_out(y_BLD).reshape(B, h, w, c)


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
    """The encoder's blocks at one resolution, and the step to half of it."""

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
        widths = (inputs, *(outputs,) * config.blocks)
        self.resnets = nnx.List(
            ResidualBlock(widths[i], outputs, config.groups, rngs=rngs)
            for i in range(config.blocks)
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
    """The decoder's blocks at one resolution, and the step to twice it: nearest neighbours and a convolution."""

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
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = Conv(config.channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                config,
                i == last and config.encoder_attention,
                i < last,
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
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = Conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MiddleBlock(widths[0], config.groups, config.middle_attention, rngs=rngs)
        self.up_blocks = nnx.List(
            UpBlock(widths[max(i - 1, 0)], width, config, i < last, rngs=rngs)
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
    """Images in [-1, 1] to latents and back; heights and widths are multiples of `config.downsampling`.

    A "kl" autoencoder goes `encode(image).sample(key)` -> `decode`; a "vq" one
    `quantizer(features(image)).latent` -> `decode`.
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
        """What the encoder says: [B, h, w, 2 z], mean and log variance, or [B, h, w, z] before quantisation."""
        x_Bhwc = self.encoder(image_BHWC)
        return x_Bhwc if self.quant_conv is None else self.quant_conv(x_Bhwc)

    def encode(self, image_BHWC: Array) -> Gaussian:
        """The distribution of the latents of a "kl" autoencoder, log variances clipped to [-30, 20]."""
        assert self.config.kind == "kl"
        mean, log_variance = jnp.split(self.features(image_BHWC), 2, axis=-1)
        return Gaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latent_Bhwz: Array) -> Array:
        """Images [B, H, W, channels], not clipped."""
        return self.decoder(
            latent_Bhwz if self.post_quant_conv is None else self.post_quant_conv(latent_Bhwz)
        )

    @property
    def last_kernel(self) -> nnx.Param:
        """The decoder's last kernel, by whose gradients the GAN's term is weighed (Esser et al., equation 7)."""
        return self.decoder.conv_out.kernel


def build(config: AutoencoderConfig, seed: int | Array) -> Autoencoder:
    """A freshly initialised autoencoder; under `jax.eval_shape` it costs nothing."""
    return Autoencoder(config, rngs=nnx.Rngs(params=seed))


def abstract_autoencoder(config: AutoencoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of the autoencoder, and its parameters as shapes with logical axis names; nothing is allocated."""
    graphs = []

    def parameters():
        graph, state = nnx.split(build(config, 0), nnx.Param)
        graphs.append(graph)
        return state

    state = jax.eval_shape(parameters)
    return graphs.pop(), state
