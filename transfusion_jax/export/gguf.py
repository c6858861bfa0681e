"""The text trunk of a run as one GGUF file, for llama.cpp and what is made of it.

Tensors are those of `llama.py` under other names. Queries and keys are in Meta's order, in which
neighbours rotate into each other. Vectors are float32 whatever `dtype` says, as llama.cpp wants
them.
"""

import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.export import llama
from transfusion_jax.export.shards import dtype_named
from transfusion_jax.export.tokenizer_json import BOI, EOI, checked_model
from transfusion_jax.export.trained import Trained
from transfusion_jax.training.checkpoint import Report

FILE = "model.gguf"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Published names -> GGUF's, both without the layer."""
KINDS = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16}


def write(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Fills `out`.

    Raises:
      ValueError: the trunk is no Llama, its rotary frequencies are scaled, or the tokenizer is of
        a kind that GGUF does not describe.
    """
    model = trained.experiment.model
    llama.check_trunk(model)
    require(
        model.rope_scaling.kind == "none",
        f"model.rope_scaling.kind={model.rope_scaling.kind!r} is not written to GGUF, where "
        "readers differ in it",
    )
    found = llama.trunk(trained)
    writer = GGUFWriter(out / FILE, "llama")
    _describe(writer, trained)
    _add_tokenizer(writer, trained.tokenizer)
    kinds = {}
    for tensor in found:
        shape = llama.shape(trained, tensor)
        kinds[tensor.name] = kind = dtype_named(dtype if len(shape) > 1 else "float32")
        raw = KINDS[kind.name]
        size = int(np.prod(shape)) * kind.itemsize
        writer.add_tensor_info(gguf_name(tensor.name), shape, kind, size, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": model.heads, "k_proj": model.num_kv_heads}
    for name, array in llama.values(trained, found):
        if count := heads.get(name.split(".")[-2]):
            array = neighbours(array, count)
        writer.write_tensor_data(np.ascontiguousarray(array, kinds[name]))
    writer.close()
    report(f"{FILE}: text alone; BOI and EOI are its last two tokens")


def gguf_name(name: str) -> str:
    """model.layers.7.mlp.up_proj.weight -> blk.7.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{NAMES[match[2]]}.weight"
    return f"{NAMES[stem]}.weight"


def neighbours(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [N * H, D] of queries or keys: rows i and i + H / 2 of a head become 2i and 2i + 1."""
    halves = array.reshape(heads, 2, -1, array.shape[-1])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _describe(writer: GGUFWriter, trained: Trained) -> None:
    model = trained.experiment.model
    writer.add_name(trained.experiment.name)
    writer.add_context_length(trained.experiment.data.row_length)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.ffn_width)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_vocab_size(trained.tokenizer.size)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer) -> None:
    """The entries of the sentencepiece model, whose kinds have the same numbers in GGUF."""
    model = checked_model(tokenizer)
    names = [piece.piece for piece in model.pieces]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*names, BOI, EOI])
    writer.add_token_scores([*(piece.score for piece in model.pieces), 0.0, 0.0])
    kinds = [TokenType(piece.type) for piece in model.pieces]
    writer.add_token_types([*kinds, TokenType.CONTROL, TokenType.CONTROL])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
