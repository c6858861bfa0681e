"""The text trunk in the layout of Hugging Face's `LlamaForCausalLM`: settings, names and matrices.

Both split the halves of a head that rotate into each other, so queries and keys are only reshaped.
Their matrices are [out, in]; ours are [in, out], with heads kept apart.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from transfusion_jax.config import ModelConfig, RopeScaling
from transfusion_jax.errors import require

EMBEDDING, OUTPUT = "embedding_VD", "output_DV"
ENDS = {
    EMBEDDING: "model.embed_tokens.weight",
    "transformer.norm.scale": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
"""Our names of what is there once -> theirs."""
BLOCKS = {
    "transformer.blocks.attention_norm.scale": "input_layernorm.weight",
    "transformer.blocks.attention.q_DNH": "self_attn.q_proj.weight",
    "transformer.blocks.attention.k_DKH": "self_attn.k_proj.weight",
    "transformer.blocks.attention.v_DKH": "self_attn.v_proj.weight",
    "transformer.blocks.attention.out_NHD": "self_attn.o_proj.weight",
    "transformer.blocks.mlp_norm.scale": "post_attention_layernorm.weight",
    "transformer.blocks.mlp.gate_DF": "mlp.gate_proj.weight",
    "transformer.blocks.mlp.up_DF": "mlp.up_proj.weight",
    "transformer.blocks.mlp.down_FD": "mlp.down_proj.weight",
}
"""Our names of what every layer has, stacked -> theirs, in a layer."""


def in_layer(layer: int, name: str) -> str:
    """Their whole name of a tensor of a layer."""
    return f"model.layers.{layer}.{name}"


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """One of our arrays, of one layer if it is stacked, as they keep it; a view."""
    if name == EMBEDDING or array.ndim == 1:
        return array
    inputs = array.ndim - 1 if name.endswith("out_NHD") else 1
    return array.reshape(int(np.prod(array.shape[:inputs])), -1).T


def to_ours(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_theirs`, for an array of this shape; a copy where it must be."""
    return tensor if name == EMBEDDING or tensor.ndim == 1 else tensor.T.reshape(shape)


def check_trunk(model: ModelConfig) -> None:
    """Raises ValueError for a trunk that is no Llama."""
    require(
        model.family != "chameleon",
        "a chameleon's images are tokens, so it has no text trunk apart from them",
    )
    require(not model.qk_norm, "a Llama has no norm of queries and keys (model.qk_norm=True)")
    require(
        model.norm_placement == "pre",
        f"a Llama has its norms before its layers (model.norm_placement={model.norm_placement!r})",
    )


def to_config(model: ModelConfig, vocab_size: int, length: int) -> dict[str, Any]:
    """The contents of config.json, for transformers 4 and 5.

    Version 5 reads `rope_parameters`. Version 4 ignores it and reads `rope_theta` and
    `rope_scaling`, without which it takes theta 10,000 and no scaling.

    Args:
      length: positions that the model was trained on.
    """
    scaling = _their_scaling(model.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _their_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.length,
    }


def from_config(raw: Mapping[str, Any]) -> tuple[ModelConfig, bool]:
    """The model of a config.json, of version 4 or 5, and whether its embeddings are tied.

    Raises:
      ValueError: it is not a Llama, or has an option that our transformer has not.
    """
    require(
        raw.get("model_type") == "llama",
        f"model_type={raw.get('model_type')!r} is not 'llama'",
    )
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or width // heads
    require(
        head_dim * heads == width,
        f"head_dim={head_dim} times num_attention_heads={heads} is not hidden_size={width}",
    )
    for name in ("attention_bias", "mlp_bias"):
        require(not raw.get(name), f"{name}=true: our layers have no biases")
    activation = raw.get("hidden_act", "silu")
    require(activation in ("silu", "swish"), f"hidden_act={activation!r} is not 'silu'")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    model = ModelConfig(
        family="llama",
        image_attention="causal",
        layers=raw["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        mlp_width=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=_our_scaling(scaling),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
    )
    return model, bool(raw.get("tie_word_embeddings", False))


def _our_scaling(raw: Mapping[str, Any]) -> RopeScaling:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    require(
        kind in ("linear", "llama3"),
        f"rope_type={kind!r} is not supported, only 'default', 'linear' and 'llama3'",
    )
    scaling = RopeScaling(kind=kind, factor=float(raw["factor"]))
    if kind == "linear":
        return scaling
    return dataclasses.replace(
        scaling,
        low=float(raw["low_freq_factor"]),
        high=float(raw["high_freq_factor"]),
        length=int(raw["original_max_position_embeddings"]),
    )
