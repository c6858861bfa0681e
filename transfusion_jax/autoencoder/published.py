"""The layout of diffusers' `AutoencoderKL` (and `VQModel`, which is only written): configuration,
tensor names and shapes.

Stable Diffusion 1 to 3, XL and FLUX are published in it. Conversions only: `codec.py` reads the
files, `export/autoencoder.py` writes them. Published kernels are [out, in, height, width] or
[out, in]; ours are [height, width, in, out] or [in, out].
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.errors import require

WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
)

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "act_fn": "silu",
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Diffusers' defaults, for fields that a config.json leaves out."""

MODULES = {
    ".downsample.": ".downsamplers.0.conv.",
    ".upsample.": ".upsamplers.0.conv.",
    ".mid_block.attention.": ".mid_block.attentions.0.",
    ".to_out.": ".to_out.0.",
    "quantizer.codebook": "quantize.embedding.weight",
}
"""Our name of a module -> the published one, where they differ."""

DOWN, ATTENTION_DOWN, UP = "DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D"

CURRENT_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Name of an attention module in checkpoints of 2022 and 2023 -> its name in diffusers today."""


def is_published(raw: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are diffusers' rather than ours."""
    return "_class_name" in raw


def read_config(raw: Mapping[str, Any]) -> tuple[AutoencoderConfig, float, float]:
    """Configuration, scale and shift from the contents of a published config.json.

    Raises:
      ValueError: another class of model, or an option that this package does not implement.
    """
    name = raw["_class_name"]
    require(name == "AutoencoderKL", f"_class_name={name!r} is not 'AutoencoderKL'")
    raw = DEFAULTS | dict(raw)
    _check_config(raw)
    widths = raw["block_out_channels"]
    unit = math.gcd(*widths)
    size = raw["sample_size"]
    config = AutoencoderConfig(
        size=size if isinstance(size, int) else min(size),
        channels=raw["in_channels"],
        latent_channels=raw["latent_channels"],
        width=unit,
        multipliers=tuple(width // unit for width in widths),
        groups=raw["norm_num_groups"],
        blocks=raw["layers_per_block"],
        middle_attention=raw["mid_block_add_attention"],
        encoder_attention=raw["down_block_types"][-1] == ATTENTION_DOWN,
        latent_projection=raw["use_quant_conv"],
    )
    return config, float(raw["scaling_factor"]), float(raw["shift_factor"] or 0.0)


def _check_config(raw: Mapping[str, Any]) -> None:
    widths = raw["block_out_channels"]
    require(len(widths) > 0, "block_out_channels names no resolution")
    for name, supported in (("down_block_types", DOWN), ("up_block_types", UP)):
        blocks = list(raw[name])
        require(
            len(blocks) == len(widths),
            f"{name}={raw[name]} and block_out_channels={widths} differ in length",
        )
        if supported == DOWN and blocks[-1] == ATTENTION_DOWN:
            blocks.pop()
        other = ", ".join(repr(block) for block in blocks if block != supported)
        require(not other, f"{name} has {other}; only {supported!r} is supported")
    require(raw["act_fn"] in ("silu", "swish"), f"act_fn={raw['act_fn']!r} is not 'silu'")
    for one, two in (("in_channels", "out_channels"), ("use_quant_conv", "use_post_quant_conv")):
        require(raw[one] == raw[two], f"{one}={raw[one]} and {two}={raw[two]} differ")
    for name in ("latents_mean", "latents_std"):
        require(
            raw[name] is None,
            f"{name}={raw[name]} is not supported, only scaling_factor and shift_factor",
        )


def to_config(config: AutoencoderConfig, scale: float, shift: float) -> dict[str, Any]:
    """The contents of a published config.json; for kind "kl", inverts `read_config`.

    Raises:
      ValueError: diffusers has no such autoencoder.
    """
    groups = {min(config.groups, width) for width in config.widths}
    require(
        len(groups) == 1,
        f"diffusers has one number of groups for all layers, not {sorted(groups)} "
        f"(model.groups={config.groups}, channels {config.widths})",
    )
    vq = config.kind == "vq"
    require(
        not vq or config.latent_projection,
        "diffusers' VQModel always has 1x1 convolutions around its codes "
        "(model.latent_projection=False)",
    )
    levels = len(config.widths)
    last = ATTENTION_DOWN if config.encoder_attention else DOWN
    projected = config.latent_projection
    return {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "down_block_types": [DOWN] * (levels - 1) + [last],
        "up_block_types": [UP] * levels,
        "act_fn": "silu",
        "norm_num_groups": groups.pop(),
        "sample_size": config.size,
        "scaling_factor": scale,
        "mid_block_add_attention": config.middle_attention,
        **(
            {"num_vq_embeddings": config.codes, "vq_embed_dim": config.latent_channels}
            if vq
            else {
                "shift_factor": shift,
                "use_quant_conv": projected,
                "use_post_quant_conv": projected,
                "force_upcast": True,
            }
        ),
    }


def weights_file(directory: Path) -> Path:
    """The published weights in a directory: full precision if present, otherwise half."""
    files = [directory / name for name in WEIGHTS]
    return next((file for file in files if file.is_file()), files[0])


def tensor_name(name: str) -> str:
    """Published name of one of our parameters, given its dotted name."""
    for ours, theirs in MODULES.items():
        name = name.replace(ours, theirs)
    module, leaf = name.rsplit(".", 1)
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


def tensor_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Published shape of a parameter that has this shape here."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def to_our_layout(tensor: np.ndarray) -> np.ndarray:
    """A published tensor with its dimensions in our order."""
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_their_layout(name: str, array: np.ndarray) -> np.ndarray:
    """Inverts `to_our_layout`; a codebook is the same in both."""
    if name == "quantizer.codebook":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def to_current_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as diffusers stores them today.

    Older checkpoints have other names for the parts of attention, and 1x1 convolutions in the place
    of its linear maps.
    """
    current = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for old, new in CURRENT_NAMES.items():
                name = name.replace(old, new)
            if tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        current[name] = tensor
    return current
