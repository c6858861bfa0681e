"""U-Net patches: the halves of a U-Net around the transformer (section 3.2).

    image [h, w, c] -> blocks, halved, blocks, ... -> [h / k, w / k] -> P vectors of width D
                         |           skips            |                     transformer
    prediction      <- blocks, doubled, blocks, ... <- [h / k, w / k] <- P vectors of width D

The blocks are those of Ho et al. (2020, arXiv 2006.11239, appendix B): two convolutions, with the
timestep added between them, and no attention, which the transformer has. Norms are ordinary layer
norms over the channels of a place, as the paper says; the rest is our choice.

In array names N is an image of any row and slot, and h, w, c are the grid and channels at some
resolution.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.config import ImageConfig, ModelConfig
from transfusion_jax.config.model import UNET_WIDTHS
from transfusion_jax.model.layers import LayerNorm, added, parameter, project, zeros
from transfusion_jax.model.patches import timestep
from transfusion_jax.model.patches.linear import POSITION_SCALE
from transfusion_jax.parallel.gathers import gathered


class Conv(nnx.Module):
    """A convolution with zero padding and bias; at stride 2 it halves the grid."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        gain: float = 1.0,
        axes: tuple[str | None, str | None] = (None, "embed"),
        rngs: nnx.Rngs,
    ):
        shape = (size, size, inputs, outputs)
        scale = gain * math.prod(shape[:3]) ** -0.5
        self.kernel = parameter(rngs.params(), shape, (None, None, *axes), scale)
        self.bias = zeros((outputs,), ("norm",))
        self.stride = stride

    def __call__(self, x_Nhwc: Array) -> Array:
        y_Nhwc = jax.lax.conv_general_dilated(
            x_Nhwc,
            gathered(self.kernel, x_Nhwc.dtype),
            window_strides=(self.stride,) * 2,
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return added(y_Nhwc, self.bias[...][None, None, None])


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W time))), zero at first but for x."""

    def __init__(self, inputs: int, outputs: int, time: int, epsilon: float, *, rngs: nnx.Rngs):
        self.norm_in = LayerNorm(inputs, epsilon)
        self.conv_in = Conv(inputs, outputs, rngs=rngs)
        self.time_Ec = parameter(rngs.params(), (time, outputs), (None, "embed"), time**-0.5)
        self.norm_out = LayerNorm(outputs, epsilon)
        self.conv_out = Conv(outputs, outputs, gain=0.0, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x_Nhwc: Array, time_NE: Array) -> Array:
        y_Nhwc = self.conv_in(jax.nn.silu(self.norm_in(x_Nhwc)))
        y_Nhwc = added(y_Nhwc, project(time_NE, self.time_Ec)[:, None, None])
        y_Nhwc = self.conv_out(jax.nn.silu(self.norm_out(y_Nhwc)))
        return y_Nhwc + (x_Nhwc if self.shortcut is None else self.shortcut(x_Nhwc))


class UNetPatches(nnx.Module):
    """A `PatchEncoder` whose skips, and the timestep, go around the transformer."""

    def __init__(self, config: ModelConfig, image: ImageConfig, *, rngs: nnx.Rngs):
        widths = config.unet_widths or UNET_WIDTHS[image.patch]
        first, last, waves, D = widths[0], widths[-1], timestep.WIDTH, config.width
        blocks, time, epsilon = config.unet_blocks, 4 * first, config.norm_epsilon
        self.time_in = parameter(rngs.params(), (waves, time), (None, "embed"), waves**-0.5)
        self.time_out = parameter(rngs.params(), (time, time), ("embed", None), time**-0.5)
        self.conv_in = Conv(image.channels, first, rngs=rngs)
        self.halve = nnx.List(
            Conv(a, b, stride=2, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.down = nnx.List(
            nnx.List(ResidualBlock(c, c, time, epsilon, rngs=rngs) for _ in range(blocks))
            for c in widths
        )
        self.in_cD = parameter(rngs.params(), (last, D), (None, "embed"), last**-0.5)
        self.out_Dc = parameter(rngs.params(), (D, last), ("embed", None), D**-0.5)
        self.up = nnx.List(
            nnx.List(ResidualBlock(2 * c, c, time, epsilon, rngs=rngs) for _ in range(blocks))
            for c in widths
        )
        self.double = nnx.List(
            Conv(b, a, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norm_out = LayerNorm(first, epsilon)
        # At first the prediction is zero.
        self.conv_out = Conv(first, image.channels, gain=0.0, axes=("embed", None), rngs=rngs)
        self.learned = config.patch_position == "learned"
        if self.learned:
            self.position_PD = parameter(
                rngs.params(), (image.patches, D), (None, "embed"), POSITION_SCALE
            )
        self.widths, self.image, self.remat = widths, image, config.remat != "none"
        self.loop = config.unet_loop == "scan" and blocks > 1
        self.dtype = jnp.dtype(config.compute_dtype)

    def encode(self, noisy_BMhwc: Array, t_BM: Array) -> tuple[Array, dict[str, Any]]:
        """Patch vectors [B, M, P, D]; carried are the skips, one of each block, and the
        timestep."""
        B, M = t_BM.shape
        waves = timestep.sinusoid(t_BM).astype(self.dtype)
        time_BME = jax.nn.silu(project(jax.nn.silu(project(waves, self.time_in)), self.time_out))
        time_NE = time_BME.reshape(B * M, -1)
        x_Nhwc = self.conv_in(noisy_BMhwc.astype(self.dtype).reshape(B * M, *self.image.shape))
        skips = []
        for level, blocks in enumerate(self.down):
            if level > 0:
                x_Nhwc = self.halve[level - 1](x_Nhwc)
            x_Nhwc, outputs = self._down(blocks, x_Nhwc, time_NE)
            skips += [skip_Nhwc.reshape(B, M, *x_Nhwc.shape[1:]) for skip_Nhwc in outputs]
        vectors_BMPD = project(x_Nhwc.reshape(B, M, self.image.patches, -1), self.in_cD)
        if self.learned:
            vectors_BMPD = added(vectors_BMPD, self.position_PD[...][None, None])
        return vectors_BMPD, {"skips": skips, "time_BME": time_BME}

    def decode(self, hidden_BMPD: Array, carried: dict[str, Any]) -> Array:
        """The prediction [B, M, h, w, c], in float32."""
        B, M = hidden_BMPD.shape[:2]
        skips = list(carried["skips"])
        time_NE = carried["time_BME"].reshape(B * M, -1)
        x_Nhwc = project(hidden_BMPD, self.out_Dc).reshape(B * M, *skips[-1].shape[2:])
        for level in reversed(range(len(self.widths))):
            if level < len(self.widths) - 1:
                x_Nhwc = self.double[level](_doubled(x_Nhwc))
            blocks = self.up[level]
            its_skips = [skips.pop().reshape(x_Nhwc.shape) for _ in blocks]
            x_Nhwc = self._up(blocks, x_Nhwc, its_skips, time_NE)
        predicted_Nhwc = self.conv_out(jax.nn.silu(self.norm_out(x_Nhwc)))
        return predicted_Nhwc.reshape(B, M, *self.image.shape).astype(jnp.float32)

    def multiplications(self) -> dict[str, int]:
        """Convolutions multiply every place of their output, the timestep's layers once."""
        h, w, _ = self.image.shape

        def convolutions(layers: Any, level: int) -> int:
            kernels = jax.tree.leaves(nnx.state(layers, nnx.Param))
            places = (h >> level) * (w >> level)
            return places * sum(x.size for x in kernels if x.ndim == 4)

        image = convolutions((self.conv_in, self.conv_out), 0)
        for level in range(len(self.widths)):
            image += convolutions((self.down[level], self.up[level]), level)
        for level in range(len(self.widths) - 1):
            image += convolutions(self.halve[level], level + 1)
            image += convolutions(self.double[level], level)
        time = [self.time_in, self.time_out]
        time += [b.time_Ec for half in (self.down, self.up) for blocks in half for b in blocks]
        return {
            "patch": math.prod(self.in_cD.shape) + math.prod(self.out_Dc.shape),
            "image": image + sum(math.prod(kernel.shape) for kernel in time),
        }

    def _down(
        self, blocks: nnx.List, x_Nhwc: Array, time_NE: Array
    ) -> tuple[Array, Iterable[Array]]:
        """The last block's output, and those of all blocks."""

        def apply(block, x_Nhwc, _):
            x_Nhwc = block(x_Nhwc, time_NE)
            return x_Nhwc, x_Nhwc

        return self._each(blocks, apply, x_Nhwc, [None] * len(blocks))

    def _up(self, blocks: nnx.List, x_Nhwc: Array, skips: list[Array], time_NE: Array) -> Array:
        """The last block's output; each block sees its skip beside its input."""

        def apply(block, x_Nhwc, skip_Nhwc):
            return block(jnp.concatenate([x_Nhwc, skip_Nhwc], -1), time_NE), None

        return self._each(blocks, apply, x_Nhwc, skips)[0]

    def _each(
        self, blocks: nnx.List, apply: Callable, x_Nhwc: Array, beside: list
    ) -> tuple[Array, Iterable]:
        """`apply(block, x, its element of beside)` -> (x, y), over blocks of equal shapes: the last
        x, and every y. Unless `model.remat` is none, the backward pass keeps the inputs alone."""
        graphs, states = zip(*map(nnx.split, blocks), strict=True)

        def layer(x_Nhwc, its):
            state, element = its
            return apply(nnx.merge(graphs[0], state), x_Nhwc, element)

        if self.remat:
            layer = jax.checkpoint(layer, prevent_cse=not self.loop)
        if self.loop:
            both = zip(states, beside, strict=True)
            return jax.lax.scan(layer, x_Nhwc, jax.tree.map(lambda *x: jnp.stack(x), *both))
        found = []
        for its in zip(states, beside, strict=True):
            x_Nhwc, y = layer(x_Nhwc, its)
            found.append(y)
        return x_Nhwc, found


def _doubled(x_Nhwc: Array) -> Array:
    """Every place four times."""
    return jnp.repeat(jnp.repeat(x_Nhwc, 2, axis=1), 2, axis=2)
