"""The parts of a block: linear maps, norms, SwiGLU. Every parameter names its logical
axes."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.parallel.gathers import (
    gathered,
    scattered,
    scatters_in_steps,
    value_and_axes,
    whole,
)


def parameter(
    key: Array, shape: Sequence[int], axes: Sequence[str | None], scale: float
) -> nnx.Param:
    """A float32 normal parameter with a logical axis name for each dimension; `parallel/rules.py`
    places it by these.

    Kernels with fan-in n start at a scale of n^-1/2, so their outputs start at the same scale
    whatever the width or the size of a patch.
    """
    value = scale * jax.random.normal(key, tuple(shape), jnp.float32)
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def ones(shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
    """A float32 parameter of ones, with logical axis names."""
    return nnx.Param(
        jnp.ones(tuple(shape), jnp.float32), out_sharding=tuple(axes), eager_sharding=False
    )


def zeros(shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
    """A float32 parameter of zeros, with logical axis names."""
    return nnx.Param(
        jnp.zeros(tuple(shape), jnp.float32), out_sharding=tuple(axes), eager_sharding=False
    )


def project(x: Array, kernel: nnx.Param, contracted: int = 1) -> Array:
    """Contracts the last `contracted` dimensions of x with the first ones of a kernel, in x's
    dtype."""
    value, axes = value_and_axes(kernel, x.dtype)
    if scatters_in_steps(axes, x.shape[0]):
        return _project_in_steps(x, value, axes, contracted)
    return product(x, gathered(kernel, x.dtype), contracted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project_in_steps(x, kernel, axes, contracted):
    return product(x, whole(kernel, axes), contracted)


def _project_in_steps_forward(x, kernel, axes, contracted):
    kernel = whole(kernel, axes)
    return product(x, kernel, contracted), (x, kernel)


def _project_in_steps_backward(axes, contracted, factors, gradient):
    x, kernel = factors

    def part(x, gradient):
        (found,) = jax.linear_transpose(lambda kernel: product(x, kernel, contracted), kernel)(
            gradient
        )
        return found

    (x_gradient,) = jax.linear_transpose(lambda x: product(x, kernel, contracted), x)(gradient)
    return x_gradient, scattered(part, x, gradient, axes)


_project_in_steps.defvjp(_project_in_steps_forward, _project_in_steps_backward)


def product(
    x: Array, kernel: Array, contracted: int = 1, dtype: jax.typing.DTypeLike | None = None
) -> Array:
    """[B, L, D] with [D, N, H] gives [B, L, N, H], in `dtype` (default: that of x).

    Done as a product of two matrices: XLA's CPU backend takes twice as long over the gradient of
    the same product with its dimensions kept apart. They are kept apart where positions are
    sharded, or every device would compute all of them, and on a mesh of TPUs, where XLA would copy
    arrays to flatten them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    on_tpu = mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"
    if on_tpu or mesh.shape.get("sequence", 1) > 1:
        return jnp.tensordot(x, kernel, contracted, preferred_element_type=dtype)
    lead, tail = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    inner = math.prod(kernel.shape[:contracted])
    flat = jnp.matmul(x.reshape(-1, inner), kernel.reshape(inner, -1), preferred_element_type=dtype)
    return flat.reshape(*lead, *tail)


def added(x: Array, part: Array) -> Array:
    """x and a part of as many dimensions that is the same along some of them, in x's dtype.

    Added in float32: the gradient of `part` is a sum over what it is repeated along, and in
    bfloat16 a sum stalls at some 256 times what is added to it.
    """
    return (x.astype(jnp.float32) + part.astype(jnp.float32)).astype(x.dtype)


def float32_product(x: Array, kernel_DV: Array) -> Array:
    """[B, L, D] with a float32 [D, V] gives [B, L, V] in float32: factors in x's dtype, sums and
    result in float32.

    In the backward pass the gradient of the result is rounded to x's dtype, its two products have
    float32 sums, and the kernel's gradient stays float32. Rounding the gradient halves what is
    written and read of it, the largest array of a training step, and costs no accuracy on a TPU,
    whose matrix unit rounds float32 factors to bfloat16 in any case. Rounding the result instead
    would put an error of up to 2^-9 of a logit into the loss.
    """
    if x.dtype == jnp.float32:
        return product(x, kernel_DV)
    return _float32_product(x, kernel_DV)


@jax.custom_vjp
def _float32_product(x, kernel_DV):
    return product(x, kernel_DV.astype(x.dtype), dtype=jnp.float32)


def _float32_product_forward(x, kernel_DV):
    return _float32_product(x, kernel_DV), (x, kernel_DV)


def _float32_product_backward(factors, gradient):
    x, kernel_DV = factors
    gradient = gradient.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    return (
        product(gradient, kernel_DV.astype(x.dtype).T),
        jnp.tensordot(x, gradient, (rows, rows), preferred_element_type=jnp.float32),
    )


_float32_product.defvjp(_float32_product_forward, _float32_product_backward)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = ones((width,), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_BLD: Array) -> Array:
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...][None, None, :]).astype(x_BLD.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias over the last dimension, in float32
    (Ba et al. 2016)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = ones((width,), ("norm",))
        self.bias = zeros((width,), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        centred = x.astype(jnp.float32)
        centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
        square = jnp.mean(centred * centred, axis=-1, keepdims=True)
        last = (1,) * (x.ndim - 1) + (-1,)
        scaled = centred * jax.lax.rsqrt(square + self.epsilon) * self.scale[...].reshape(last)
        return (scaled + self.bias[...].reshape(last)).astype(x.dtype)


class SwiGLU(nnx.Module):
    """(silu(x W_gate) * (x W_up)) W_down (Shazeer 2020, equation 6)."""

    def __init__(self, width: int, hidden: int, out_gain: float, *, rngs: nnx.Rngs):
        self.gate_DF = parameter(rngs.params(), (width, hidden), ("embed", "mlp"), width**-0.5)
        self.up_DF = parameter(rngs.params(), (width, hidden), ("embed", "mlp"), width**-0.5)
        self.down_FD = parameter(
            rngs.params(), (hidden, width), ("mlp", "embed"), out_gain * hidden**-0.5
        )

    def __call__(self, x_BLD: Array) -> Array:
        hidden_BLF = jax.nn.silu(project(x_BLD, self.gate_DF)) * project(x_BLD, self.up_DF)
        return project(hidden_BLF, self.down_FD)
