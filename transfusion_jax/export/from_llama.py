"""Llama weights of others, as what `train.initial` starts a run from.

They are mapped safetensors, read tensor by tensor and written in the layout of
`model/published.py`, whose names are Hugging Face's. What changes is the vocabulary, which grows by
BOI and EOI, and the order of queries and keys where the layout is Meta's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transfusion_jax import __version__
from transfusion_jax.config import Experiment, ModelConfig
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.export.llama_config import Source, source_config
from transfusion_jax.export.shards import Described, write_shards
from transfusion_jax.files import write_atomic, write_json
from transfusion_jax.model.published import tensors, text_config
from transfusion_jax.tensors import check_shapes, finite, open_tensors
from transfusion_jax.training.checkpoint import Report

MULTIPLE = 128
"""Of rows of the vocabulary, so that a mesh divides them."""
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FOLLOWS = ("rotary_emb.inv_freq", "rope.freqs")
"""Ends of the names of tensors that follow from the config."""
META = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
"""Meta's names -> Hugging Face's, both without the layer."""
KEPT = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
"""Dtypes that stay; others become float32."""


def read(source: Path, out: Path, report: Report) -> None:
    """Fills the directory `out`.

    Raises:
      ValueError: `source` holds no Llama that our transformer can be, its files are damaged, or a
        number is not finite.
    """
    _check_pickles(source)
    found = {name: x for name, x in open_tensors(source).items() if not name.endswith(FOLLOWS)}
    described = source_config(source, found)
    if described.meta:
        found = {huggingface_name(name): x for name, x in found.items()}
    if described.tied and EMBEDDING in found:
        found[OUTPUT] = found[EMBEDDING]
    _check(source, described, found)
    tokenizer = _tokenizer(source, described.model.vocab_size, report)
    entries = tokenizer.boi if tokenizer else described.model.vocab_size
    rows = -(-max(entries + 2, described.model.vocab_size) // MULTIPLE) * MULTIPLE
    grown = replace(described.model, vocab_size=rows)
    planned = {
        tensor.name: Described(
            tensor.published_shape, kind if (kind := found[tensor.name].dtype) in KEPT else KEPT[0]
        )
        for tensor in tensors(_experiment(grown))
    }
    weights = Weights(found, described, rows)
    with np.errstate(over="ignore"):  # what becomes infinite as float32 is found
        cast = ((name, np.asarray(weights[name], x.dtype)) for name, x in planned.items())
        write_shards(out, planned, ((name, finite(name, x)) for name, x in cast))
    if tokenizer:
        write_atomic(out / "tokenizer.model", tokenizer.model)
    write_json(out / "config.json", _config(grown, described.length, entries, tokenizer))
    known = described.model.vocab_size
    report(f"BOI and EOI are tokens {entries} and {entries + 1} of {rows}")
    if entries < known:
        report(
            f"  rows below {known} are as they were: what begins as BOI is their token {entries}"
            f"{f', as EOI {entries + 1}' if entries + 1 < known else ''}"
        )
    report(f"a model that fits: {_flags(grown)}")


@dataclass(frozen=True)
class Weights:
    """The tensors to write, each made when it is asked for."""

    found: Mapping[str, np.ndarray]
    """By Hugging Face's names; mapped."""
    source: Source
    rows: int
    """Of the vocabulary that is written."""

    def __getitem__(self, name: str) -> np.ndarray:
        tensor, model = self.found[name], self.source.model
        if name in (EMBEDDING, OUTPUT):
            return grown(tensor, self.rows)
        if self.source.meta and name.endswith("q_proj.weight"):
            return halves_apart(tensor, model.heads)
        if self.source.meta and name.endswith("k_proj.weight"):
            return halves_apart(tensor, model.num_kv_heads)
        return tensor


def grown(tensor: np.ndarray, rows: int) -> np.ndarray:
    """A matrix [V, D] with more rows, which are the mean of those it has.

    So the new tokens have the mean of the others' logits, which is at most the logarithm of their
    mean probability (Jensen): k new tokens take at most k / (V + k) of it.
    """
    mean = np.mean(tensor, axis=0, dtype=np.float64).astype(tensor.dtype)
    found = np.empty((rows, tensor.shape[1]), tensor.dtype)
    found[: len(tensor)] = tensor
    found[len(tensor) :] = mean
    return found


def halves_apart(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows [N * H, D] of queries or keys from Meta's order to Hugging Face's, which is ours.

    Meta rotates neighbours, rows 2i and 2i + 1 of a head; Hugging Face rows i and i + H / 2.
    """
    pairs = tensor.reshape(heads, -1, 2, tensor.shape[-1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def huggingface_name(name: str) -> str:
    """layers.7.attention.wq.weight -> model.layers.7.self_attn.q_proj.weight."""
    if not name.startswith("layers."):
        return META.get(name, name)
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{META.get(inner, inner)}"


def _check_pickles(source: Path) -> None:
    """Raises ValueError for parts that have to be joined: they are not only to be converted."""
    parts = sorted(source.glob("consolidated.*.pth")) if source.is_dir() else []
    require(
        len(parts) < 2 or any(source.glob("*.safetensors")),
        f"{source} has {len(parts)} pickles, {parts[0].name if parts else ''} and so on, each with "
        "a part of every matrix; pickles can run code and are not read; convert them where you "
        "trust them: python -m transformers.models.llama.convert_llama_weights_to_hf",
    )


def _check(source: Path, described: Source, found: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless the tensors are exactly those of the model."""
    check_shapes(
        {x.name: x.published_shape for x in tensors(_experiment(described.model))},
        {name: tensor.shape for name, tensor in found.items()},
        f"the tensors in {source} do not fit its {'params' if described.meta else 'config'}.json",
    )


def _experiment(model: ModelConfig) -> Experiment:
    return Experiment("imported", model=model)


def _tokenizer(source: Path, rows: int, report: Report) -> Tokenizer | None:
    """The source's sentencepiece model, if it has one; Llama 3's `tokenizer.model` is none.

    Raises:
      ValueError: it has more entries than the vocabulary has rows.
    """
    file = source / "tokenizer.model"
    try:
        tokenizer = Tokenizer(file.read_bytes(), str(file))
    except (OSError, ValueError):
        report(
            f"no sentencepiece tokenizer.model in {source}: weights alone; a run that starts from "
            "them must give their ids to its text"
        )
        return None
    require(
        tokenizer.boi <= rows,
        f"{file} has {tokenizer.boi} entries, and the vocabulary {rows} rows",
    )
    return tokenizer


def _config(
    model: ModelConfig, length: int, entries: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """As `export --format safetensors` writes it, of weights without images."""
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos} if tokenizer else {}
    return {
        "architectures": ["Llama"],
        "model_type": "transfusion_jax_llama",
        "text_config": text_config(model, length),
        **special,
        "boi_token_id": entries,
        "eoi_token_id": entries + 1,
        "tokenizer_size": entries + 2,
        "tie_word_embeddings": False,
        "transfusion_jax_version": __version__,
    }


def _flags(model: ModelConfig) -> str:
    """The fields that a run must have, as the command line takes them."""
    names = ("layers", "width", "heads", "kv_heads", "mlp_width", "vocab_size", "rope_theta")
    fields = {name: getattr(model, name) for name in (*names, "norm_epsilon")}
    scaling = model.rope_scaling
    if scaling.kind != "none":
        fields |= {f"rope_scaling.{name}": value for name, value in vars(scaling).items()}
    return " ".join(f"--model.{name.replace('_', '-')} {value}" for name, value in fields.items())
