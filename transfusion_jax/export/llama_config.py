"""What a Llama is, from the config.json of Hugging Face's layout or the params.json of Meta's."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.config import ModelConfig, RopeScaling
from transfusion_jax.errors import require

LENGTH = 2048
"""Positions of a row, where neither file says."""


@dataclass(frozen=True)
class Source:
    """A Llama of others."""

    model: ModelConfig
    """Its `vocab_size` is that of the file."""
    length: int
    """Positions that it was made for."""
    tied: bool
    """Whether the projection to logits is the embedding."""
    meta: bool
    """Whether names and queries and keys are in Meta's layout."""


def source_config(directory: Path, tensors: Mapping[str, np.ndarray]) -> Source:
    """The Llama in a directory, which has these tensors.

    Raises:
      ValueError: no file describes one that our transformer can be.
    """
    meta = "tok_embeddings.weight" in tensors
    file = directory / ("params.json" if meta else "config.json")
    require(file.is_file(), f"no {file.name} in {directory}, which would say what model it is")
    try:
        raw = json.loads(file.read_text())
        require(isinstance(raw, dict), "not a JSON object")
        found = _meta(raw, tensors) if meta else _huggingface(raw)
        layers = found.model.layers
        require(layers <= len(tensors), f"{layers} layers, and {len(tensors)} tensors")
        return found
    except KeyError as error:
        raise ValueError(f"{file} describes no Llama: it has no {error}") from None
    except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file} describes no Llama that can be imported: {error}") from None


def _huggingface(raw: Mapping[str, Any]) -> Source:
    """Of transformers 4, with `rope_theta` and `rope_scaling`, or 5, with `rope_parameters`."""
    kind = raw.get("model_type")
    require(kind == "llama", f"model_type={kind!r} is not 'llama'")
    width, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    head_dim = raw.get("head_dim") or width // heads
    require(
        head_dim * heads == width,
        f"head_dim={head_dim} times num_attention_heads={heads} is not hidden_size={width}",
    )
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        require(not raw.get(name), f"{name}={raw.get(name)} is not supported")
    activation = raw.get("hidden_act", "silu")
    require(activation in ("silu", "swish"), f"hidden_act={activation!r} is not 'silu'")
    rope = raw.get("rope_parameters") or {}
    model = ModelConfig(
        family="llama",
        image_attention="causal",
        layers=_size(raw, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        mlp_width=_size(raw, "intermediate_size"),
        vocab_size=_size(raw, "vocab_size"),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling(raw.get("rope_scaling") or rope),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
    )
    length = int(raw.get("max_position_embeddings", LENGTH))
    return Source(model, length, bool(raw.get("tie_word_embeddings")), meta=False)


def _size(raw: Mapping[str, Any], name: str) -> int:
    size = raw[name]
    require(type(size) is int and size > 0, f"{name}={size!r} is not a whole number above 0")
    return size


def _scaling(raw: Mapping[str, Any]) -> RopeScaling:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return RopeScaling()
    require(
        kind in ("linear", "llama3"),
        f"rope_type={kind!r} is not supported, only 'default', 'linear' and 'llama3'",
    )
    factor = float(raw["factor"])
    if kind == "linear":
        return RopeScaling("linear", factor)
    return RopeScaling(
        "llama3",
        factor,
        low=float(raw["low_freq_factor"]),
        high=float(raw["high_freq_factor"]),
        length=int(raw["original_max_position_embeddings"]),
    )


def _meta(raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Source:
    """Sizes that params.json gives by a rule, or not at all, are those of the tensors."""
    scaling = RopeScaling()
    if raw.get("use_scaled_rope"):
        require(
            "rope_scaling_factor" in raw,
            "use_scaled_rope has no rope_scaling_factor beside it: Llama 3.1 has 8, and Llama 3.2 "
            "has 32; add it",
        )
        high = float(raw.get("rope_high_freq_factor", 4.0))
        scaling = RopeScaling("llama3", float(raw["rope_scaling_factor"]), high=high)
    heads = _size(raw, "n_heads")
    model = ModelConfig(
        family="llama",
        image_attention="causal",
        layers=_size(raw, "n_layers"),
        width=_size(raw, "dim"),
        heads=heads,
        kv_heads=raw.get("n_kv_heads") or heads,
        mlp_width=len(tensors["layers.0.feed_forward.w1.weight"]),
        vocab_size=len(tensors["tok_embeddings.weight"]),
        rope_theta=float(raw.get("rope_theta", 10_000.0)),
        rope_scaling=scaling,
        norm_epsilon=float(raw["norm_eps"]),
    )
    length = int(raw.get("max_seq_len", LENGTH))
    return Source(model, length, tied="output.weight" not in tensors, meta=True)
