"""`jax.export` artefacts of a model's phases, their weights, and a runner that needs jax alone.

prefill.jax_export  decode.jax_export  denoise.jax_export   StableHLO for cpu, cuda and tpu at once
model-0000k-of-n.safetensors                                what they take as weights
picture.jax_export  autoencoder.safetensors                 of a run on latents: to pixels
run.py  run.json  tokenizer.model                           the runner and what it knows

StableHLO is read by versions of JAX up to six months younger, and by those of three weeks before.
"""

import shutil
from pathlib import Path
from typing import Any

import flatbuffers  # noqa: F401  (needed to serialise, and late: where it lacks, this says so)
import jax
import numpy as np
import safetensors.numpy

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.config import Experiment
from transfusion_jax.diffusion.process import process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.errors import require
from transfusion_jax.export import runner
from transfusion_jax.export.programs import picture, portable, programs
from transfusion_jax.export.shards import Described, dtype_named, write_shards
from transfusion_jax.export.trained import Trained
from transfusion_jax.files import write_json
from transfusion_jax.generation.text import never_predicted
from transfusion_jax.model.build import abstract_model
from transfusion_jax.training.checkpoint import Report


def write(trained: Trained, out: Path, dtype: str, report: Report) -> None:
    """Fills a directory.

    Norms stay float32 whatever the dtype is, as they are applied in it.

    Raises:
      ValueError: images of the model are codes.
    """
    experiment = portable(trained.experiment)
    require(
        experiment.model.images != "codes",
        "stablehlo is for images that are diffused, or text alone, not for a "
        f"{experiment.model.family}",
    )
    planned = {
        name: Described(
            shape.shape, dtype_named("float32" if "norm" in trained.axes[name] else dtype)
        )
        for name, shape in trained.shapes.items()
    }
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
    write_shards(out, planned, ((name, trained.read(name)) for name in planned))
    write_json(out / "run.json", _about(trained, experiment, list(found)))
    (out / "tokenizer.model").write_bytes(trained.tokenizer.model)
    shutil.copyfile(runner.__file__, out / "run.py")


def _about(trained: Trained, experiment: Experiment, found: list[str]) -> dict[str, Any]:
    """What the runner knows of the run: sizes, marks, and how text and images are sampled."""
    model, image, tokenizer = experiment.model, experiment.image, trained.tokenizer
    steps = sampler(experiment.sampler, process(experiment.diffusion))
    alpha, sigma = (x.astype(np.float32).tolist() for x in steps.process.schedule.table())
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
        **{name: getattr(tokenizer, name) for name in ("bos", "eos", "boi", "eoi")},
        "never": np.flatnonzero(never_V).tolist(),
        "max_tokens": experiment.sampler.max_tokens,
        "temperature": experiment.sampler.temperature,
        "guidance": experiment.sampler.guidance,
        "steps": steps.steps,
        "eta": steps.eta,
        "clip": steps.clip,
        "context_timestep": experiment.sampler.context_timestep,
        "prediction": experiment.diffusion.prediction,
        "alpha": alpha,
        "sigma": sigma,
    }
