"""The layout in which models are published: names and shapes of tensors, and a config.json.

    transformer.blocks.attention.q_DNH [layers, D, N, H]   ours: layers stacked, [in, out]
    model.layers.7.self_attn.q_proj.weight [N * H, D]      published: layers apart, [out, in]

The text trunk has the names of Llama in transformers, whose rotary halves are ours too. In a
config.json the parts are nested, as in those of other models of text and images. Conversions of
arrays are views: a tensor of a mapped file takes no memory by them.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from transfusion_jax.config import Experiment, ModelConfig, RopeScaling
from transfusion_jax.config.model import UNET_WIDTHS
from transfusion_jax.model.build import abstract_model

TRUNK = {
    "embedding_VD": "model.embed_tokens.weight",
    "output_DV": "lm_head.weight",
    "transformer.norm.scale": "model.norm.weight",
    "transformer.image_norm.scale": "model.image_norm.weight",
}
BLOCKS = {"transformer.blocks.": "", "transformer.image_blocks.": "image."}
"""Of blocks -> after model.layers.<layer>."""
BLOCK = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.q_DNH": "self_attn.q_proj.weight",
    "attention.k_DKH": "self_attn.k_proj.weight",
    "attention.v_DKH": "self_attn.v_proj.weight",
    "attention.out_NHD": "self_attn.o_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.q_norm.bias": "self_attn.q_norm.bias",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "attention.k_norm.bias": "self_attn.k_norm.bias",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate_DF": "mlp.gate_proj.weight",
    "mlp.up_DF": "mlp.up_proj.weight",
    "mlp.down_FD": "mlp.down_proj.weight",
}
"""Of a block -> after that."""
AS_THEY_ARE = ("scale", "bias", "embedding_VD", "position_PD")
"""Last names of parameters that are no linear maps or convolutions."""


Axes = tuple[str | None, ...]
"""Logical axes of a parameter; the first of a stacked one is "layers"."""


class Tensor(NamedTuple):
    """A parameter that is not stacked, or one layer of a stacked one."""

    parameter: str
    """Its dotted name here."""
    layer: int | None
    shape: tuple[int, ...]
    """Here; without layers."""

    @property
    def name(self) -> str:
        return tensor_name(self.parameter, self.layer)

    @property
    def published_shape(self) -> tuple[int, ...]:
        return tensor_shape(self.parameter, self.shape)


def parameters(experiment: Experiment) -> dict[str, tuple[jax.ShapeDtypeStruct, Axes]]:
    """Shape and logical axes of every parameter of a model, by dotted name."""
    return {
        ".".join(map(str, path)): (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            tuple(leaf.get_metadata("out_sharding")),
        )
        for path, leaf in nnx.to_flat_state(abstract_model(experiment)[1])
    }


def tensors(experiment: Experiment) -> Iterator[Tensor]:
    """All tensors that a model is published as; the layers of a parameter follow one another."""
    for name, (leaf, axes) in parameters(experiment).items():
        if axes[:1] == ("layers",):
            yield from (Tensor(name, layer, leaf.shape[1:]) for layer in range(leaf.shape[0]))
        else:
            yield Tensor(name, None, leaf.shape)


def tensor_name(name: str, layer: int | None = None) -> str:
    """Published name of one of our parameters, given its dotted name; of one layer of it, if it is
    stacked."""
    if layer is not None:
        (prefix,) = (prefix for prefix in BLOCKS if name.startswith(prefix))
        inner = name.removeprefix(prefix)
        return f"model.layers.{layer}.{BLOCKS[prefix]}{BLOCK.get(inner) or _plain(inner)}"
    return TRUNK.get(name) or f"model.{_plain(name)}"


def of_text(name: str) -> str:
    """The parameter that does for text what this one does for images in a mixture; else itself."""
    return name.replace("transformer.image_", "transformer.", 1)


def _plain(name: str) -> str:
    """patches.in_ZD -> patches.in_proj.weight, norm.scale -> norm.weight."""
    *modules, leaf = name.split(".")
    if leaf in ("scale", "kernel", "bias"):
        return ".".join([*modules, "bias" if leaf == "bias" else "weight"])
    stem = re.sub(r"_[A-Z][A-Za-z]*$", "", leaf)
    return ".".join([*modules, f"{stem}_proj" if stem in ("in", "out") else stem, "weight"])


def tensor_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Published shape of a parameter, or a layer of it, that has this shape here."""
    kind, split = _kind(name)
    if kind == "kernel":
        return (shape[3], shape[2], *shape[:2])
    if kind == "linear":
        return math.prod(shape[split:]), math.prod(shape[:split])
    return shape


def to_published(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter, or a layer of it, as it is published."""
    kind, split = _kind(name)
    if kind == "kernel":
        return array.transpose(3, 2, 0, 1)
    if kind == "linear":
        return array.reshape(math.prod(array.shape[:split]), -1).T
    return array


def from_published(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverts `to_published`; `shape` is ours."""
    kind, _ = _kind(name)
    if kind == "kernel":
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T.reshape(shape) if kind == "linear" else tensor


def _kind(name: str) -> tuple[str, int]:
    """What a parameter is, and how many of its dimensions go in."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "kernel" or leaf in AS_THEY_ARE:
        return leaf, 0
    return "linear", 2 if leaf == "out_NHD" else 1


def model_config(experiment: Experiment) -> dict[str, Any]:
    """The parts of a config.json that a model has."""
    parts = {
        "text_config": text_config(experiment.model, experiment.data.row_length),
        "image_config": image_config(experiment),
        "diffusion_config": diffusion_config(experiment),
    }
    return {name: part for name, part in parts.items() if part is not None}


def text_config(model: ModelConfig, length: int) -> dict[str, Any]:
    """The trunk in the words of a Llama's config.json, and what a Llama does not have.

    Args:
      length: of the rows that it was trained on.
    """
    scaling = _scaling(model.rope_scaling)
    return {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 4 reads the first two of these, 5 the last.
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "norm_placement": model.norm_placement,
        "qk_norm": model.qk_norm,
    }


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.length,
    }


def image_config(experiment: Experiment) -> dict[str, Any] | None:
    """What the model takes for images; None for text alone."""
    model, image = experiment.model, experiment.image
    if model.images == "none":
        return None
    grid = {
        "images": model.images,
        "height": image.height,
        "width": image.width,
        "channels": image.channels,
        "patch_size": image.patch,
        "attention": model.image_attention,
    }
    if model.images == "codes":
        return {**grid, "codes": image.codes}
    encoder = {
        "patch_encoder": model.patch_encoder,
        "patch_position": model.patch_position,
        "timestep": model.timestep,
        "experts": model.experts,
    }
    if model.patch_encoder == "unet":
        widths = model.unet_widths or UNET_WIDTHS[image.patch]
        encoder |= {"unet_widths": list(widths), "unet_blocks": model.unet_blocks}
    return {**grid, **encoder}


def diffusion_config(experiment: Experiment) -> dict[str, Any] | None:
    """How images are diffused; None for models that do not."""
    diffusion = experiment.diffusion
    if experiment.model.images != "latents":
        return None
    return {
        "schedule": diffusion.schedule,
        "num_train_timesteps": diffusion.steps,
        "prediction_type": diffusion.prediction,
        "snr_scale": diffusion.snr_scale,
    }
