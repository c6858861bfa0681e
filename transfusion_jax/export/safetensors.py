"""The whole model as safetensors: tensors with a torch user's names and shapes, and what to know.

model-00001-of-0000n.safetensors, model.safetensors.index.json   names in `model/published.py`
config.json              text, image and diffusion parts   tokenizer.model       sentencepiece
generation_config.json   how it was sampled                tokenizer.json        for transformers
experiment.json          all settings of the run           tokenizer_config.json
vae/                     the autoencoder, for diffusers    README.md             a model card
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax import __version__
from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.sources.dataset import directory_digest
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.export.autoencoder import write_autoencoder
from transfusion_jax.export.card import UNKNOWN, model_card
from transfusion_jax.export.shards import Described, dtype_named, write_shards
from transfusion_jax.export.tokenizer_json import write_tokenizer
from transfusion_jax.export.trained import Trained
from transfusion_jax.files import write_atomic, write_json
from transfusion_jax.model.published import (
    model_config,
    tensor_name,
    tensors,
    to_published,
)
from transfusion_jax.training.checkpoint import Report

ARCHITECTURES = {"transfusion": "Transfusion", "chameleon": "Chameleon", "llama": "Llama"}

AUTOENCODER = "vae"
"""The folder that diffusers' pipelines have it in."""


def write(trained: Trained, out: Path, dtype: str, report: Report, licence: str = UNKNOWN) -> None:
    """Fills the directory `out`."""
    kind = dtype_named(dtype)
    planned = {
        tensor.name: Described(tensor.published_shape, kind)
        for tensor in tensors(trained.experiment)
    }
    write_shards(out, planned, _values(trained))
    write_json(out / "config.json", config(trained, dtype))
    write_json(out / "generation_config.json", generation_config(trained))
    _write_tokenizer(trained, out, report)
    _write_autoencoder(trained, out, dtype, report)
    write_atomic(out / "experiment.json", dumps(trained.experiment).encode())
    write_atomic(out / "README.md", model_card(trained, planned, dtype, licence).encode())


def _write_tokenizer(trained: Trained, out: Path, report: Report) -> None:
    write_atomic(out / "tokenizer.model", trained.tokenizer.model)
    try:
        write_tokenizer(trained.tokenizer, out, trained.experiment.data.row_length)
    except ValueError as error:
        report(f"there is no tokenizer.json: {error}")


def _write_autoencoder(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Of a run on latents or codes; in our layout where diffusers has no such autoencoder."""
    place = trained.run_dir / "autoencoder"
    if not place.is_dir():
        return
    codec = load_codec(place)
    (out / AUTOENCODER).mkdir()
    try:
        write_autoencoder(codec, out / AUTOENCODER, dtype)
    except ValueError as error:
        report(f"the autoencoder is as this package has it: {error}")
        save_codec(out / AUTOENCODER, codec.config, codec.parameters, codec.scale, codec.shift)


def config(trained: Trained, dtype: str) -> dict[str, Any]:
    """What a reader of the tensors must know."""
    experiment = trained.experiment
    family = experiment.model.family
    return {
        "architectures": [ARCHITECTURES[family]],
        # Not transformers' own types: its classes do not read these images.
        "model_type": "transfusion_jax",
        **model_config(experiment),
        **special_tokens(trained.tokenizer),
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "weights": trained.weights,
        "step": trained.step,
        **_autoencoder(trained),
        "transfusion_jax_version": __version__,
    }


def _autoencoder(trained: Trained) -> dict[str, str]:
    """Which one made the images that the model knows; `vae/` may have it in another layout."""
    place = trained.run_dir / "autoencoder"
    return {"autoencoder": directory_digest(place)} if place.is_dir() else {}


def generation_config(trained: Trained) -> dict[str, Any]:
    """How the run samples, in the words of transformers where it has them."""
    sampler = trained.experiment.sampler
    tokens = special_tokens(trained.tokenizer)
    greedy = sampler.temperature == 0
    return {
        "bos_token_id": tokens["bos_token_id"],
        "eos_token_id": tokens["eos_token_id"],
        "do_sample": not greedy,
        **({} if greedy else {"temperature": sampler.temperature}),
        "max_new_tokens": sampler.max_tokens,
        "image_sampler": {
            name: value
            for name, value in asdict(sampler).items()
            if name not in ("temperature", "max_tokens")
        },
    }


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "boi_token_id": tokenizer.boi,
        "eoi_token_id": tokenizer.eoi,
        # Rows of the embedding from here to `vocab_size` are padding, never tokens; those
        # after it are the codes of a chameleon.
        "tokenizer_size": tokenizer.size,
    }


def _values(trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, in the order of `published.tensors`; one array of the checkpoint is held."""
    for name in trained.shapes:
        stacked = trained.stacked(name)
        # An expression, so that nothing here refers to an array while the next is read.
        yield from (
            (tensor_name(name, layer if stacked else None), to_published(name, array))
            for layer, array in enumerate(trained.by_layer(name))
        )
