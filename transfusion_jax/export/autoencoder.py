"""The autoencoder of a run as diffusers' `AutoencoderKL`, or `VQModel` where its latents are codes.

config.json   diffusion_pytorch_model.safetensors

What a run trained on latents keeps, or an autoencoder's own run, is in its `autoencoder/`.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy

from transfusion_jax.autoencoder import published
from transfusion_jax.autoencoder.codec import Codec, load_codec, named
from transfusion_jax.errors import require
from transfusion_jax.export.shards import dtype_named
from transfusion_jax.export.trained import Weights
from transfusion_jax.files import write_atomic, write_json
from transfusion_jax.training.checkpoint import Report


def opened(run_dir: Path, step: int | None, weights: Weights, report: Report) -> Codec:
    """The autoencoder of a run, of its average at the end.

    Raises:
      ValueError: there is none, or another step or the raw weights are asked for.
    """
    place = run_dir / "autoencoder"
    require(run_dir.is_dir(), f"no such directory: {run_dir}")
    require(
        place.is_dir(),
        f"no autoencoder in {run_dir}: a run on latents has one, and an autoencoder's run when it "
        "has ended",
    )
    require(
        step is None and weights == "average",
        "of an autoencoder there is only the average of its last step (--step and --weights are "
        "for other formats)",
    )
    return load_codec(place)


def write(codec: Codec, out: Path, dtype: str, report: Report) -> None:
    """Fills `out`.

    Raises:
      ValueError: diffusers has no such autoencoder.
    """
    write_autoencoder(codec, out, dtype)
    report(
        "latents are (x - shift_factor) * scaling_factor: "
        f"shift_factor {codec.shift:g}, scaling_factor {codec.scale:g}"
    )


def write_autoencoder(codec: Codec, out: Path, dtype: str = "float32") -> None:
    """Writes diffusers' two files into a directory.

    Raises:
      ValueError: diffusers has no such autoencoder.
    """
    config = published.to_config(codec.config, codec.scale, codec.shift)
    kind = dtype_named(dtype)
    tensors = {
        published.tensor_name(name): np.ascontiguousarray(
            published.to_their_layout(name, array), kind
        )
        for name, array in named(codec.parameters).items()
    }
    content = safetensors.numpy.save(dict(sorted(tensors.items())), {"format": "pt"})
    write_atomic(out / published.WEIGHTS[0], content)
    write_json(out / "config.json", config)
