"""The text trunk of a run as a `LlamaForCausalLM` of transformers, with its tokenizer.

config.json   generation_config.json   model-0000k-of-0000n.safetensors   the files' index
tokenizer.json   tokenizer_config.json   tokenizer.model
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.config import ModelConfig
from transfusion_jax.errors import require
from transfusion_jax.export.shards import Described, dtype_named, write_shards
from transfusion_jax.export.tokenizer_json import write_tokenizer
from transfusion_jax.export.trained import Trained
from transfusion_jax.files import write_json
from transfusion_jax.model.published import (
    BLOCK,
    BLOCKS,
    TRUNK,
    Tensor,
    tensors,
    text_config,
    to_published,
)
from transfusion_jax.training.checkpoint import Report

VOCABULARY = ("embedding_VD", "output_DV")
"""Parameters with a row for every token."""
IMAGES = "patches."
"""Parameters that text does not meet."""


def write(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Fills `out`. Rows of the vocabulary that no token has are cut off; BOI and EOI stay.

    Raises:
      ValueError: the trunk is no Llama, or the tokenizer has no equal in tokenizers.
    """
    model, tokenizer = trained.experiment.model, trained.tokenizer
    check_trunk(model)
    found = trunk(trained)
    length = trained.experiment.data.row_length
    write_tokenizer(tokenizer, out, length)
    write_json(out / "config.json", config(trained, dtype))
    write_json(out / "generation_config.json", generation_config(trained))
    kind = dtype_named(dtype)
    planned = {tensor.name: Described(shape(trained, tensor), kind) for tensor in found}
    write_shards(out, planned, values(trained, found))
    report(f"{tokenizer.size} of the vocabulary's {model.vocab_size} rows are tokens, and are kept")


def check_trunk(model: ModelConfig) -> None:
    """Raises ValueError for a trunk that is no Llama."""
    require(
        model.family != "chameleon",
        "a chameleon's images are tokens too: it has no text trunk that is a model of its own",
    )
    require(not model.qk_norm, "a Llama has no norm of queries and keys (model.qk_norm=True)")
    require(
        model.norm_placement == "pre",
        f"a Llama's norms are before its layers (model.norm_placement={model.norm_placement!r})",
    )


def trunk(trained: Trained) -> list[Tensor]:
    """The tensors of the text trunk, the layers of a parameter one after another.

    Raises:
      ValueError: it has one that a Llama has not.
    """
    found = [x for x in tensors(trained.experiment) if not x.parameter.startswith(IMAGES)]
    known = {*TRUNK, *(BLOCKS + name for name in BLOCK)}
    unknown = sorted({tensor.parameter for tensor in found} - known)
    require(not unknown, f"a Llama has no {', '.join(unknown[:3])}")
    return found


def values(trained: Trained, found: list[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its published name, in this order; one array of the checkpoint is held."""
    arrays: Iterator[np.ndarray] = iter(())
    for tensor in found:
        if not tensor.layer:
            arrays = trained.by_layer(tensor.parameter)
        rows = trained.tokenizer.size if tensor.parameter in VOCABULARY else None
        yield tensor.name, to_published(tensor.parameter, next(arrays))[:rows]


def shape(trained: Trained, tensor: Tensor) -> tuple[int, ...]:
    """Of a tensor as it is written, padding of the vocabulary cut off."""
    rows, *others = tensor.published_shape
    return (trained.tokenizer.size if tensor.parameter in VOCABULARY else rows, *others)


def config(trained: Trained, dtype: str) -> dict[str, Any]:
    """The contents of config.json, for transformers 4 and 5."""
    experiment, tokenizer = trained.experiment, trained.tokenizer
    model = dataclasses.replace(experiment.model, vocab_size=tokenizer.size)
    settings = text_config(model, experiment.data.row_length)
    for name in ("norm_placement", "qk_norm"):  # which a Llama has not
        del settings[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        **settings,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "torch_dtype": dtype,
    }


def generation_config(trained: Trained) -> dict[str, Any]:
    """Text ends at EOS, and where an image would begin."""
    tokenizer, sampler = trained.tokenizer, trained.experiment.sampler
    ends = [tokenizer.eos]
    if trained.experiment.model.images != "none":
        ends.append(tokenizer.boi)
    greedy = sampler.temperature == 0
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.eos,
        "do_sample": not greedy,
        **({} if greedy else {"temperature": sampler.temperature, "top_k": 0}),
        "max_new_tokens": sampler.max_tokens,
    }
