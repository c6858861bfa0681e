"""Layers of the autoencoder: convolution, linear map, group norm, residual block, attention.

Arrays are [B, height, width, channels] in float32. Parameters are replicated over a mesh, so their
logical axes are None.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.model.layers import ones, parameter, project


def zeros(width: int) -> nnx.Param:
    return nnx.Param(jnp.zeros((width,), jnp.float32), out_sharding=(None,), eager_sharding=False)


class Conv(nnx.Module):
    """A square convolution with bias.

    With stride 1 the output has the size of the input. With stride 2 it has half, and the input is
    padded with one row and one column of zeros at the bottom and right only.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs
    ):
        shape = (size, size, inputs, outputs)
        self.kernel = parameter(rngs.params(), shape, (None,) * 4, math.prod(shape[:3]) ** -0.5)
        self.bias = zeros(outputs)
        self.stride = stride
        self.padding = ((size // 2, size // 2) if stride == 1 else (0, 1),) * 2

    def __call__(self, x_Bhwc: Array) -> Array:
        y_Bhwc = jax.lax.conv_general_dilated(
            x_Bhwc,
            self.kernel[...],
            window_strides=(self.stride,) * 2,
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y_Bhwc + self.bias[...][None, None, None]


class Linear(nnx.Module):
    """x W + b over the last dimension."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = parameter(rngs.params(), (inputs, outputs), (None, None), inputs**-0.5)
        self.bias = zeros(outputs)

    def __call__(self, x_BLD: Array) -> Array:
        return project(x_BLD, self.kernel) + self.bias[...][None, None]


class GroupNorm(nnx.Module):
    """Normalises over the grid and each group of channels (Wu & He 2018), with epsilon 1e-6."""

    def __init__(self, width: int, groups: int):
        self.scale = ones((width,), (None,))
        self.bias = zeros(width)
        self.groups = min(groups, width)

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = x_Bhwc - self._mean(x_Bhwc)
        x_Bhwc = x_Bhwc * jax.lax.rsqrt(self._mean(x_Bhwc * x_Bhwc) + 1e-6)
        return x_Bhwc * self.scale[...][None, None, None] + self.bias[...][None, None, None]

    def _mean(self, x_Bhwc: Array) -> Array:
        """Mean over the grid and the channel's group, for every channel: [B, 1, 1, c].

        Taken over the grid first, so the large array is never reshaped.
        """
        B, _, _, c = x_Bhwc.shape
        channel_mean = jnp.mean(x_Bhwc, axis=(1, 2)).reshape(B, self.groups, c // self.groups)
        group_mean = jnp.mean(channel_mean, axis=2, keepdims=True)
        return jnp.broadcast_to(group_mean, channel_mean.shape).reshape(B, 1, 1, c)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_Bhwc: Array) -> Array:
        y_Bhwc = self.conv1(jax.nn.silu(self.norm1(x_Bhwc)))
        y_Bhwc = self.conv2(jax.nn.silu(self.norm2(y_Bhwc)))
        if self.conv_shortcut is not None:
            x_Bhwc = self.conv_shortcut(x_Bhwc)
        return x_Bhwc + y_Bhwc


class Attention(nnx.Module):
    """Single-head self-attention over all grid positions, added to its input."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, groups)
        self.to_q = Linear(width, width, rngs=rngs)
        self.to_k = Linear(width, width, rngs=rngs)
        self.to_v = Linear(width, width, rngs=rngs)
        self.to_out = Linear(width, width, rngs=rngs)

    def __call__(self, x_Bhwc: Array) -> Array:
        B, h, w, c = x_Bhwc.shape
        x_BLD = self.group_norm(x_Bhwc).reshape(B, h * w, c)
        logits_BLS = jnp.einsum("BLD,BSD->BLS", self.to_q(x_BLD) * c**-0.5, self.to_k(x_BLD))
        y_BLD = jnp.einsum("BLS,BSD->BLD", jax.nn.softmax(logits_BLS), self.to_v(x_BLD))
        return x_Bhwc + self.to_out(y_BLD).reshape(B, h, w, c)
