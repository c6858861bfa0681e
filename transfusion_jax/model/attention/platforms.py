"""The platforms of each implementation of attention, checked when a computation is lowered for one.

Only then is the platform known: a process on a CPU can compile for a TPU that it does not have
(`jax.experimental.topologies`), whatever its default backend. The check is the lowering rule of a
primitive that returns its operand.
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
    """The model with each "auto" replaced by what it stands for on a platform.

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
        implementation, block = automatic(platform, model.attention_block)
        model = replace(model, attention=implementation, attention_block=block)
    if model.attention == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise ValueError("model.attention='tokamax': pip install 'transfusion-jax[gpu]'")
    if model.layer_loop == "auto":
        unrolls = platform in ("gpu", "cuda") and model.remat in ("none", "minimal")
        model = replace(model, layer_loop="unroll" if unrolls else "scan")
    if model.unet_loop == "auto":
        model = replace(model, unet_loop="scan" if platform == "tpu" else "unroll")
    if model.remat == "attention" and model.attention == "dense":
        raise ValueError("model.remat='attention' keeps what dense attention does not have")
    return model


def automatic(platform: str, block: int) -> tuple[str, int]:
    """(implementation, block) that "auto" stands for; a block that the kernel cannot have becomes
    its default."""
    if platform == "tpu":
        return "pallas", 0 if block % 128 else block
    on_gpu = platform in ("gpu", "cuda") and importlib.util.find_spec("tokamax") is not None
    return "tokamax" if on_gpu else "chunked", block


def require_platform(implementation: str, platform: str) -> None:
    """Raises ValueError, naming the implementations that do, unless this one runs on the
    platform."""
    # A device says "gpu" where lowering says "cuda".
    platform = "cuda" if platform == "gpu" else platform

    def runs(name: str) -> bool:
        return PLATFORMS[name] is None or platform in PLATFORMS[name]

    if not runs(implementation):
        others = ", ".join(filter(runs, PLATFORMS))
        where = ", ".join(PLATFORMS[implementation])
        raise ValueError(
            f"model.attention={implementation!r} runs on {where}; on {platform}: {others}"
        )


def refuse_other_platforms(x: Array, implementation: str) -> Array:
    """x unchanged: an integer array of the computation, so nothing is differentiated.

    Raises:
      ValueError: when lowered for a platform on which the implementation does not run.
    """
    return _platform_check.bind(x, implementation=implementation)


def _lowering(context, x, *, implementation: str):
    for platform in context.platforms or context.module_context.platforms:
        require_platform(implementation, platform)
    return [x]


_platform_check = Primitive("attention_platform_check")
_platform_check.def_impl(
    lambda x, **parameters: jax.jit(lambda x: _platform_check.bind(x, **parameters))(x)
)
_platform_check.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_platform_check, _lowering)
batching.primitive_batchers[_platform_check] = lambda xs, axes, **parameters: (
    _platform_check.bind(*xs, **parameters),
    axes[0],
)
