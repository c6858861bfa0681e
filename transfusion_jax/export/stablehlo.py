"""`jax.export` artefacts of a model's phases, their weights, and a runner that needs jax alone.

prefill.jax_export  decode.jax_export               StableHLO for cpu, cuda and tpu at once
denoise.jax_export  step.jax_export                 where images are diffused
picture.jax_export  autoencoder.safetensors         where images are latents or codes: to pixels
model-0000k-of-n.safetensors                        what the model's phases take as weights
run.py  run.json  tokenizer.model                   the runner and what it knows

StableHLO is read by versions of JAX up to six months younger, and by those of three weeks before.
"""

from pathlib import Path
from typing import Any

import flatbuffers  # noqa: F401  (needed to serialise, and late: where it lacks, this says so)
import jax
import numpy as np
import safetensors.numpy

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.config import Experiment
from transfusion_jax.export import runner, runner_tokenizer
from transfusion_jax.export.programs import picture, portable, programs
from transfusion_jax.export.shards import Described, dtype_named, write_shards
from transfusion_jax.export.trained import Trained
from transfusion_jax.files import write_json
from transfusion_jax.generation.text import never_predicted
from transfusion_jax.images import MODES
from transfusion_jax.model.build import abstract_model
from transfusion_jax.training.checkpoint import Report

ASKED = (
    "max_tokens", "temperature", "image_temperature", "guidance", "steps", "context_timestep"
)  # fmt: skip
"""Settings of the sampler that the runner follows; `step` holds the others."""


def write(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Fills a directory.

    Norms stay float32 whatever the dtype is, as they are applied in it.
    """
    experiment = portable(trained.experiment)
    planned = {
        name: Described(
            shape.shape, dtype_named("float32" if "norm" in trained.axes[name] else dtype)
        )
        for name, shape in trained.shapes.items()
    }
    candidates = experiment.sampler.candidates
    if candidates > 1:
        report(f"note: run.py draws one image, not the best of sampler.candidates={candidates}")
    graph, _ = abstract_model(experiment)
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in planned.items()}
    found = programs(experiment, graph, weights)
    if (trained.run_dir / "autoencoder").is_dir():
        codec = load_codec(trained.run_dir / "autoencoder")
        found["picture"], weights = picture(codec, experiment)
        tensors = {name: np.asarray(x) for name, x in weights.items()}
        safetensors.numpy.save_file(tensors, out / "autoencoder.safetensors")
    for name, program in found.items():
        report(f"lowering {name}")
        (out / f"{name}.jax_export").write_bytes(bytes(program.exported().serialize()))
    write_shards(out, planned, ((name, trained.by_layer(name)) for name in planned))
    write_json(out / "run.json", _about(trained, experiment, list(found)))
    (out / "tokenizer.model").write_bytes(trained.tokenizer.model)
    (out / "run.py").write_text(_one_file())


def _one_file() -> str:
    """The runner, with what it imports of this package in place of the import."""
    line = f"from {runner_tokenizer.__name__} import Tokenizer\n"
    parts = Path(runner.__file__).read_text().split(line)
    return Path(runner_tokenizer.__file__).read_text().join(parts)


def _about(trained: Trained, experiment: Experiment, found: list[str]) -> dict[str, Any]:
    """What the runner knows of the run: sizes, marks, and how text and images are sampled."""
    model, image, tokenizer = experiment.model, experiment.image, trained.tokenizer
    never_V = never_predicted(model.vocab_size, tokenizer)
    never_V[tokenizer.boi] |= model.images == "none"
    return {
        "run": experiment.name,
        "step": trained.step,
        "programs": found,
        "layers": model.layers,
        "cache": [model.num_kv_heads, model.head_dim],
        "dtype": model.compute_dtype,
        "block": model.attention_block,
        "least_capacity": max(model.attention_block, image.patches + 2),
        "image": list(image.shape),
        "patches": image.patches,
        "row_length": experiment.data.row_length,
        "vocabulary": model.vocab_size,
        "codes": image.codes if model.images == "codes" else 0,
        "pictures": "picture" in found
        or model.images == "none"
        or (model.images == "latents" and image.channels in MODES),
        **{name: getattr(tokenizer, name) for name in ("bos", "eos", "boi", "eoi")},
        "never": np.flatnonzero(never_V).tolist(),
        "timesteps": experiment.diffusion.steps,
        **{name: getattr(experiment.sampler, name) for name in ASKED},
    }
