"""Interval attention on GPU: tokamax's kernels, whose mask knows intervals, though its public
function does not.

Which kernel runs is chosen here and never falls back: Mosaic for bfloat16 on Hopper and on
Blackwell of the data centre, else Triton, from Ampere on. In the forward pass both skip the blocks
that lie outside every interval of a block of queries. In the backward pass neither does, and Triton
reads the mask as booleans, [B, L, S] of them: so that pass is ours (`triton_backward.py`).
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import kept
from transfusion_jax.model.attention.triton_backward import gradients


def tokamax_attention(
    q_BLNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    intervals: Intervals,
    *,
    implementation: str | None = None,
    own_backward: bool = True,
) -> Array:
    """Same contract as `attention`, on one device.

    Args:
      implementation: tokamax's name of a kernel, "mosaic_gpu" or "triton"; None takes the one for
        this GPU. "xla" runs on any platform and builds all the scores; for tests.
      own_backward: skip blocks in the backward pass too; False is tokamax's, to measure it.

    Raises:
      ValueError: tokamax is not installed.
      NotImplementedError: no kernel runs on this GPU.
    """
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    start, end = (jnp.clip(bound, 0, S) for bound in (intervals.k_start_BL, intervals.k_end_BL))
    # A query without keys gets an average from tokamax, or, with neighbours like it, a gradient
    # that is not a number. So it sees one key, near which those around it look, and what it saw is
    # thrown away.
    empty = start >= end
    near = jnp.minimum(jnp.arange(L, dtype=start.dtype), S - 1)[None, :]
    start, end = jnp.where(empty, near, start), jnp.where(empty, near + 1, end)

    attend = _attention if own_backward else _tokamax_attention
    out = attend(implementation or _kernel_here(q_BLNH.dtype), start, end, q_BLNH, k_BSKH, v_BSKH)
    return jnp.where(empty[:, :, None, None], 0, out)


def _tokamax():
    """tokamax, its attention by name, its mask, and what it knows of GPUs."""
    try:
        import tokamax
        from tokamax._src import gpu_utils
        from tokamax._src.ops.attention.api import IMPLEMENTATIONS
        from tokamax._src.ops.attention.base import Mask
    except ImportError as error:
        message = (
            "model.attention='tokamax' needs Python 3.12 and pip install 'transfusion-jax[gpu]'"
        )
        raise ValueError(f"{message} ({error})") from error
    return tokamax, IMPLEMENTATIONS, Mask, gpu_utils


def _kernel_here(dtype) -> str:
    """As tokamax orders them, but Mosaic only where it takes the dtype and has a backward pass."""
    gpu = _tokamax()[3]
    return "mosaic_gpu" if dtype != jnp.float32 and (gpu.is_sm90() or gpu.is_sm100()) else "triton"


def _attend(implementation, k_start, k_end, q, k, v, **options):
    _, implementations, Mask, _ = _tokamax()
    mask = Mask(k_start=k_start[:, None], k_end=k_end[:, None])
    with _as_tokamax_expects():
        return implementations[implementation](
            q, k, v, mask=mask, logits_scale=q.shape[-1] ** -0.5, **options
        )


def _forward(implementation, k_start, k_end, q, k, v):
    out, (peak, total) = _attend(implementation, k_start, k_end, q, k, v, return_residuals=True)
    out, lse = kept(out, peak + jnp.log(total))
    return out, (k_start, k_end, q, k, v, out, lse)


def _backward(implementation, residuals, d_out):
    return None, None, *gradients(*residuals, d_out, interpret=implementation == "xla")


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)


def _tokamax_forward(implementation, k_start, k_end, q, k, v):
    with _as_tokamax_expects():
        return jax.vjp(functools.partial(_attend, implementation, k_start, k_end), q, k, v)


def _tokamax_backward(implementation, vjp, d_out):
    with _as_tokamax_expects():
        return None, None, *vjp(d_out)


# The backward pass is traced when the forward pass is long done, so it needs a context of its own.
_tokamax_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_tokamax_attention.defvjp(_tokamax_forward, _tokamax_backward)


@contextlib.contextmanager
def _as_tokamax_expects():
    """jax's usual promotion; and a process without a GPU may trace for one, as the platform is
    checked on lowering."""
    compiling_for_another = _tokamax()[0].config.cross_compile(jax.default_backend() != "gpu")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        compiling_for_another,
    ):
        yield
