"""Products of every position with the kernel of its modality, at the FLOPs of one kernel.

A device orders its positions by modality and cuts them into blocks, each of which multiplies one
kernel:

    a row             t t i i i i t t t i i i i t     t: text, i: a patch of an image
    in blocks of four t t t t|t t . .|i i i i|i i i i .: nothing

So many blocks of text and of images are at most one more than blocks of all positions together,
whatever the share of images (`block_count`). So shapes are static, no position is left out, and one
block of 33 at most is computed in vain. Under a mesh every device orders the positions that it has:
none moves between devices.

In array names C is a block and T a position in it, N a position of a device.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from transfusion_jax.model.layers import project
from transfusion_jax.parallel.gathers import gathered
from transfusion_jax.parallel.rules import divided, mesh_axes

PRODUCT = "grouped_product"
"""Names the results that `model.remat="minimal"` keeps."""
BLOCKS, LONGEST = 32, 1024  # blocks of a device's positions, but for blocks that would be longer

Axes = tuple[str | None, ...]


class Pair(NamedTuple):
    """The kernels of a product: of text and of images."""

    text: nnx.Param
    image: nnx.Param


class Positionwise(NamedTuple):
    """A part of a block that does the same to every position by itself."""

    function: Callable[..., tuple[Array, ...]]
    """Of positions [B, L, ...] and a product with each of the pairs: `product(x, contracted=1)`."""
    pairs: tuple[Pair, ...]
    takes: Axes
    """Logical axes of the positions, after B and L."""
    gives: tuple[Axes, ...]
    """Of each result, after B and L."""
    summed: str | None = None
    """The axis that the last product contracts, if devices may share it: each has a part of the
    sum."""


def selected(layer: Positionwise, x_BL: Array, image_BL: Array) -> tuple[Array, ...]:
    """Results of the layer, computed with both kernels at all positions, of which one is taken."""

    def of(pair: Pair, modality: str) -> Callable[..., Array]:
        return lambda x, contracted=1: project(x, getattr(pair, modality), contracted)

    text, image = (
        layer.function(x_BL, *(of(pair, modality) for pair in layer.pairs))
        for modality in Pair._fields
    )
    return tuple(chosen(image_BL, i, t) for i, t in zip(image, text, strict=True))


def chosen(image_BL: Array, image: Array, text: Array) -> Array:
    """Of two arrays [B, L, ...], at every position that of its modality."""
    return jnp.where(image_BL.reshape(*image_BL.shape, *[1] * (text.ndim - 2)), image, text)


def grouped(layer: Positionwise, x_BL: Array, image_BL: Array) -> tuple[Array, ...]:
    """Results of the layer, each position computed once."""
    kernels = [jnp.stack([gathered(kernel, x_BL.dtype) for kernel in pair]) for pair in layer.pairs]

    def local(x_BL, image_BL, *kernels):
        groups = Groups.of(image_BL)
        products = [functools.partial(product, groups.image_C, kernel) for kernel in kernels]
        results = layer.function(groups.ordered(x_BL), *products)
        return [groups.back(result, image_BL.shape)[None] for result in results]

    if not jax.sharding.get_abstract_mesh().empty:
        rows, positions = divided(("batch", "sequence"), image_BL.shape)
        axes = [pair.text.get_metadata("out_sharding")[1 - x.ndim :]
                for pair, x in zip(layer.pairs, kernels, strict=True)]  # fmt: skip
        local = jax.shard_map(
            local,
            in_specs=(
                PartitionSpec(rows, positions, *_inside(layer.takes)),
                PartitionSpec(rows, positions),
                *(PartitionSpec(None, *_inside(names)) for names in axes),
            ),
            out_specs=[
                PartitionSpec(*_inside((layer.summed,)), rows, positions, *_inside(names))
                for names in layer.gives
            ],
            check_vma=False,
        )
    # Left to XLA, the sum of the parts meets what comes after, which may want a part of it alone.
    return tuple(jnp.sum(parts, 0) for parts in local(x_BL, image_BL, *kernels))


def _inside(axes: Axes) -> Axes:
    """Mesh axes that still cut these logical axes when a product is computed."""
    return tuple(None if "fsdp" in mesh_axes(axis) else mesh_axes(axis) or None for axis in axes)


def block_count(positions: int) -> tuple[int, int]:
    """Blocks, and positions in each, that hold so many positions of two kinds in any proportion.

    Where n blocks hold all positions, n + 1 hold them by kind: whole blocks of both are n at most,
    and if they are n, nothing is left; if n - 1, a rest of each kind at most.
    """
    block = min(-(-positions // BLOCKS), LONGEST)
    return -(-positions // block) + 1, block


class Groups(NamedTuple):
    """Where a device's positions are when they are ordered by modality."""

    image_C: Array
    """Whether a block is of images: int32, 0 or 1."""
    place_N: Array
    """Of every position, in all blocks laid end to end."""
    position_N: Array
    """Of every place; as many as there are positions where there is nothing."""

    @staticmethod
    def of(image_BL: Array) -> "Groups":
        image_N = image_BL.reshape(-1)
        count = image_N.size
        blocks, block = block_count(count)
        text_blocks = -(-jnp.sum(~image_N) // block)
        place_N = jnp.where(
            image_N,
            text_blocks * block + jnp.cumsum(image_N) - 1,
            jnp.cumsum(~image_N) - 1,
        )
        position_N = jnp.full(blocks * block, count, jnp.int32)
        position_N = position_N.at[place_N].set(jnp.arange(count, dtype=jnp.int32))
        image_C = (jnp.arange(blocks) >= text_blocks).astype(jnp.int32)
        return Groups(image_C, place_N.astype(jnp.int32), position_N)

    def ordered(self, x_BL: Array) -> Array:
        """[B, L, ...] -> [C, T, ...], zeros where there is nothing."""
        x_N = x_BL.reshape(-1, *x_BL.shape[2:])
        moved = _moved(x_N, self.position_N, self.place_N)
        return moved.reshape(len(self.image_C), -1, *x_BL.shape[2:])

    def back(self, x_CT: Array, shape: tuple[int, int]) -> Array:
        """[C, T, ...] -> [B, L, ...]: inverts `ordered`."""
        x_N = x_CT.reshape(-1, *x_CT.shape[2:])
        return _moved(x_N, self.place_N, self.position_N).reshape(*shape, *x_CT.shape[2:])


@jax.custom_vjp
def _moved(x_N: Array, source_N: Array, target_N: Array) -> Array:
    """Entry i is x[source[i]], or 0 if there is none. Target inverts source, so that gradients are
    taken like values, and not scattered."""
    return x_N.at[source_N].get(mode="fill", fill_value=0)


_moved.defvjp(
    lambda x_N, source_N, target_N: (_moved(x_N, source_N, target_N), (source_N, target_N)),
    lambda places, gradient_N: (_moved(gradient_N, *reversed(places)), None, None),
)


def product(image_C: Array, kernels: Array, x_CT: Array, contracted: int = 1) -> Array:
    """Every block times the kernel of its modality: [C, T, D] with [2, D, N, H] gives
    [C, T, N, H]."""
    tail = kernels.shape[1 + contracted :]
    inner = math.prod(kernels.shape[1 : 1 + contracted])
    flat = x_CT.reshape(*x_CT.shape[:2], inner)
    result = _products(flat, kernels.reshape(2, inner, -1), image_C)
    return checkpoint_name(result.reshape(*x_CT.shape[:2], *tail), PRODUCT)


@jax.custom_vjp
def _products(x_CTD: Array, kernels: Array, image_C: Array) -> Array:
    def block(_, given):
        x_TD, image = given
        return None, x_TD @ kernels[image]

    return jax.lax.scan(block, None, (x_CTD, image_C))[1]


def _products_forward(x_CTD, kernels, image_C):
    return _products(x_CTD, kernels, image_C), (x_CTD, kernels, image_C)


def _products_backward(given, gradient_CTF):
    """The kernels' gradients are added up in float32, each block's to that of its kernel."""
    x_CTD, kernels, image_C = given

    def block(total, given):
        x_TD, gradient_TF, image = given
        part = jnp.matmul(x_TD.T, gradient_TF, preferred_element_type=jnp.float32)
        return total.at[image].add(part), gradient_TF @ kernels[image].T

    zero = jnp.zeros(kernels.shape, jnp.float32)
    total, gradient_CTD = jax.lax.scan(block, zero, (x_CTD, gradient_CTF, image_C))
    return gradient_CTD, total.astype(kernels.dtype), None


_products.defvjp(_products_forward, _products_backward)
