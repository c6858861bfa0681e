"""The text trunk of a run as a `LlamaForCausalLM` of transformers, with its tokenizer.

config.json   generation_config.json   model-0000k-of-n.safetensors   model.safetensors.index.json
tokenizer.json   tokenizer_config.json   tokenizer.model
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.export.llama_layout import (
    BLOCKS,
    EMBEDDING,
    ENDS,
    OUTPUT,
    check_trunk,
    in_layer,
    to_config,
    to_theirs,
)
from transfusion_jax.export.shards import Described, dtype_named, write_shards
from transfusion_jax.export.tokenizer_json import write_tokenizer
from transfusion_jax.export.trained import Trained
from transfusion_jax.files import write_json
from transfusion_jax.training.checkpoint import Report


def write(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Fills `out`. Rows of the vocabulary that no token has are cut off; BOI and EOI stay.

    Raises:
      ValueError: the trunk is no Llama, or the tokenizer has no equal in tokenizers.
    """
    model, tokenizer = trained.experiment.model, trained.tokenizer
    check_trunk(model)
    length = trained.experiment.data.row_length
    write_tokenizer(tokenizer, out, length)
    config = to_config(model, tokenizer.size, length)
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    write_json(out / "config.json", {**config, **special, "torch_dtype": dtype})
    write_json(out / "generation_config.json", _generation(trained))
    write_shards(out, _planned(trained, dtype_named(dtype)), _tensors(trained))
    report(f"{tokenizer.size} of {model.vocab_size} rows of the vocabulary are tokens, and kept")


def _generation(trained: Trained) -> dict[str, Any]:
    """Greedy, as `sampler.temperature` is by default; text ends where an image would begin."""
    tokenizer: Tokenizer = trained.tokenizer
    draws = trained.experiment.model.images != "none"
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.eos, *([tokenizer.boi] if draws else [])],
        "pad_token_id": tokenizer.eos,
        "do_sample": False,
    }


def _planned(trained: Trained, dtype: np.dtype) -> Mapping[str, Described]:
    """Every tensor, in the order of `_tensors`."""
    layers, planned = trained.experiment.model.layers, {}
    for name, theirs in {**ENDS, **BLOCKS}.items():
        shape = trained.shapes[name].shape
        if name in BLOCKS:
            like = to_theirs(name, np.broadcast_to(np.float32(0), shape[1:]))
            for layer in range(layers):
                planned[in_layer(layer, theirs)] = Described(like.shape, dtype)
        else:
            planned[theirs] = Described((trained.tokenizer.size, *shape[1:]), dtype)
    return planned


def _tensors(trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
    for name, theirs in {**ENDS, **BLOCKS}.items():
        for layer, array in enumerate(trained.by_layer(name)):
            tensor = to_theirs(name, array)
            if name in (EMBEDDING, OUTPUT):
                tensor = tensor[: trained.tokenizer.size]
            yield (in_layer(layer, theirs) if name in BLOCKS else theirs), tensor
