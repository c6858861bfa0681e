"""The end of a training: averaged weights, measured on held-out pictures, saved as a codec."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder import quantizer
from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.autoencoder.training import losses
from transfusion_jax.autoencoder.training.judges import Judges
from transfusion_jax.autoencoder.training.reconstruction import compare, write_grid
from transfusion_jax.autoencoder.training.state import Blueprint, State
from transfusion_jax.files import write_json
from transfusion_jax.parallel.processes import is_leader
from transfusion_jax.training.observation import Moved, nothing

SHOWN = 16  # held-out pictures on a PNG
MEASURED = 5_000  # held-out pictures that are measured, at most
AT_ONCE = 16  # of them on one device; a batch of training is cut over many


class Reconstructed(NamedTuple):
    image_Bhwc: Array
    mean_Bhwc: Array
    """Of the latents; the codes' vectors for a "vq" autoencoder."""
    variance_Bhwc: Array
    codes: Array | None


Reconstruct = Callable[[Any, np.ndarray], Reconstructed]
"""(parameters, pictures) -> the pictures through the latents' means, or the codes, and back."""


def reconstructor(blueprint: Blueprint) -> Reconstruct:
    """A function that reconstructs pictures, jitted once."""

    def reconstruct(parameters: Any, image_Bhwc: Array) -> Reconstructed:
        model = nnx.merge(blueprint.graph, parameters)
        if blueprint.experiment.model.kind == "kl":
            gaussian = model.encode(image_Bhwc)
            variance = jnp.exp(gaussian.log_variance)
            return Reconstructed(model.decode(gaussian.mean), gaussian.mean, variance, None)
        quantized = model.quantizer(model.features(image_Bhwc))
        latent = quantized.latent
        return Reconstructed(model.decode(latent), latent, jnp.zeros_like(latent), quantized.codes)

    return jax.jit(reconstruct)


def averaged(state: State) -> Any:
    """The averaged weights, on one device of this process."""
    return _on_one_device(state.ema)


def _on_one_device(tree: Any) -> Any:
    return jax.device_put(jax.device_get(tree), jax.local_devices()[0])


def show(
    reconstruct: Reconstruct, parameters: Any, held_out: Sequence[np.ndarray], path: Path
) -> None:
    """Writes a few held-out pictures above their reconstructions."""
    images = np.stack([held_out[i] for i in range(min(SHOWN, len(held_out)))])
    found = reconstruct(parameters, images).image_Bhwc
    write_grid(path, images, jnp.clip(found, -1.0, 1.0))


def measure(
    blueprint: Blueprint,
    reconstruct: Reconstruct,
    parameters: Any,
    judges: Judges,
    held_out: Sequence[np.ndarray],
    moved: Moved = nothing,
) -> dict[str, float]:
    """Scores of held-out reconstructions, use of the codes, and the `latent_scale` to train with.

    Latents times `latent_scale` have unit variance; codes are not scaled.

    Args:
      moved: called for every batch; what it raises ends the measurement.
    """
    means = []
    variances = []
    codes = []

    def through(image: np.ndarray) -> Array:
        moved()
        found = reconstruct(parameters, image)
        means.append(np.asarray(found.mean_Bhwc))
        variances.append(np.asarray(found.variance_Bhwc))
        codes.append(found.codes)
        return found.image_Bhwc

    features = None
    if judges.lpips is not None:
        weights = _on_one_device(judges.lpips)
        features = jax.jit(lambda x: losses.pooled_features(weights, x))
    experiment = blueprint.experiment
    scores = compare(through, _batches(held_out), features)
    if codes[0] is not None:
        use = quantizer.usage(jnp.concatenate(codes), experiment.model.codes)
        scores |= {"codebook_use": float(use.share), "codebook_perplexity": float(use.perplexity)}
        return {**scores, "latent_scale": 1.0}
    # A model is fed samples, whose variance is that of the means plus that about the means.
    deviation = float(np.sqrt(np.concatenate(means).var() + np.concatenate(variances).mean()))
    return {**scores, "latent_scale": 1.0 / deviation}


def _batches(held_out: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    count = min(MEASURED, len(held_out))
    for at in range(0, count, AT_ONCE):
        yield np.stack([held_out[i] for i in range(at, min(at + AT_ONCE, count))])


def finish(
    blueprint: Blueprint,
    state: State,
    judges: Judges,
    held_out: Sequence[np.ndarray],
    directory: Path,
    seconds: float,
    moved: Moved = nothing,
) -> dict[str, Any]:
    """Measures the averaged weights and writes what a finished run holds; returns the summary.

    Args:
      moved: as in `measure`.
    """
    reconstruct = reconstructor(blueprint)
    parameters = averaged(state)
    summary = {
        **measure(blueprint, reconstruct, parameters, judges, held_out, moved),
        "parameters": blueprint.parameters,
        "steps": blueprint.experiment.train.steps,
        "train_seconds": round(seconds, 1),
    }
    if is_leader():
        show(reconstruct, parameters, held_out, directory / "samples" / "reconstructions.png")
        save_codec(
            directory / "autoencoder",
            blueprint.experiment.model,
            parameters,
            summary["latent_scale"],
            0.0,
        )
        write_json(directory / "summary.json", summary)
    return summary
