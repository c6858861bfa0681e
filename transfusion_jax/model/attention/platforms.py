"""Where each implementation of attention runs, checked for the platform that a computation is lowered for.

That platform is known only when the computation is lowered: a process on a CPU can compile for a TPU that it does not
have (`jax.experimental.topologies`), so the default backend says nothing. A primitive that returns its operand as it
is carries the check there.
"""

import importlib.util
from dataclasses import replace

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from transfusion_jax.config import ModelConfig

PLATFORMS: dict[str, tuple[str, ...] | None] = {
    "chunked": None,
    "dense": None,
    "pallas": ("tpu",),
    "tokamax": ("cuda",),
}
"""None: all of them."""
DEFAULT_BLOCK = {"chunked": 128, "pallas": 512}


def for_platform(model: ModelConfig, platform: str) -> ModelConfig:
    """The model with the implementation that it has on a platform.

    Raises:
      ValueError: its implementation, or its remat policy, does not run there.
    """
    if model.remat == "offload" and platform == "cpu":
        raise ValueError(
            "model.remat='offload' moves arrays from an accelerator to its host; on cpu: full"
        )
    if model.attention != "auto":
        require_platform(model.attention, platform)
    else:
        implementation, block = best(platform, model.attention_block)
        model = replace(model, attention=implementation, attention_block=block)
    if model.remat == "attention" and model.attention not in DEFAULT_BLOCK:
        kinds = " and ".join(DEFAULT_BLOCK)
        raise ValueError(
            f"model.remat='attention' keeps what {kinds} attention give, and this is {model.attention}"
        )
    return model


def best(platform: str, block: int) -> tuple[str, int]:
    """The implementation, and its block, that "auto" stands for; a block that does not fit a kernel is left to it."""
    if platform == "tpu":
        return "pallas", 0 if block % 128 else block
    on_gpu = platform in ("gpu", "cuda") and importlib.util.find_spec("tokamax") is not None
    return "tokamax" if on_gpu else "chunked", block


def require_platform(implementation: str, platform: str) -> None:
    """Raises ValueError, with the implementations that do, unless this one runs on the platform."""
    platform = (
        "cuda" if platform == "gpu" else platform
    )  # as a device calls what lowering calls "cuda"

    def runs(name: str) -> bool:
        return PLATFORMS[name] is None or platform in PLATFORMS[name]

    if not runs(implementation):
        others = ", ".join(filter(runs, PLATFORMS))
        where = ", ".join(PLATFORMS[implementation])
        raise ValueError(
            f"model.attention={implementation!r} runs on {where}; on {platform}: {others}"
        )


def checked(x: Array, implementation: str) -> Array:
    """x as it is; an integer array, so that nothing is differentiated.

    Raises:
      ValueError: when lowered for a platform on which the implementation does not run.
    """
    return _checked.bind(x, implementation=implementation)


def _lowering(context, x, *, implementation: str):
    for platform in context.platforms or context.module_context.platforms:
        require_platform(implementation, platform)
    return [x]


_checked = Primitive("checked_attention_platform")
_checked.def_impl(lambda x, **parameters: jax.jit(lambda x: _checked.bind(x, **parameters))(x))
_checked.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_checked, _lowering)
batching.primitive_batchers[_checked] = lambda xs, axes, **parameters: (
    _checked.bind(*xs, **parameters),
    axes[0],
)
