"""The parts of a Llama block: linear maps, RMSNorm, SwiGLU. Every parameter names its logical axes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.parallel.rules import gathered


def parameter(
    key: Array, shape: Sequence[int], axes: Sequence[str | None], scale: float
) -> nnx.Param:
    """A float32 normal parameter whose dimensions carry logical axis names (`parallel/rules.py` places them).

    Every kernel with fan-in n starts at n^-1/2, so that widths from 128 to 4,096, and patches of 4 to 512 values,
    start alike.
    """
    value = scale * jax.random.normal(key, tuple(shape), jnp.float32)
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


def ones(shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
    return nnx.Param(
        jnp.ones(tuple(shape), jnp.float32), out_sharding=tuple(axes), eager_sharding=False
    )


def project(x: Array, kernel: nnx.Param, contracted: int = 1) -> Array:
    """Contracts the last `contracted` dimensions of x with the first ones of a kernel, in x's dtype."""
    return product(x, gathered(kernel, x.dtype), contracted)


def product(x: Array, kernel: Array, contracted: int = 1) -> Array:
    """[B, L, D] with [D, N, H] gives [B, L, N, H].

    It is done as one product of two matrices: XLA's CPU backend takes twice as long over the gradient of the same
    product with its dimensions kept apart. They stay apart where positions are cut, or every device would have all.
    """
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1:
        return jnp.tensordot(x, kernel, contracted)
    lead, tail = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    inner = math.prod(kernel.shape[:contracted])
    return (x.reshape(-1, inner) @ kernel.reshape(inner, -1)).reshape(*lead, *tail)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = ones((width,), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_BLD: Array) -> Array:
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...][None, None, :]).astype(x_BLD.dtype)


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
