"""Trains an autoencoder with the habits of the main loop: one run directory, exact resume, metrics, pictures.

config.json      the resolved experiment            samples/        reconstructions.png, and one of every so many steps
metrics.jsonl    one object per logged step         summary.json    the numbers at the end
tensorboard/     the same, as event files           autoencoder/    the trained codec, averaged weights (`load_codec`)
checkpoints/     Orbax
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from transfusion_jax.autoencoder import quantizer
from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training import losses, resnet
from transfusion_jax.autoencoder.training.pictures import batches, fingerprint, pictures
from transfusion_jax.autoencoder.training.reconstruction import compare, write_grid
from transfusion_jax.autoencoder.training.step import (
    Blueprint,
    Judges,
    State,
    blueprint,
    compiled_step,
)
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.pipeline import read
from transfusion_jax.errors import require
from transfusion_jax.files import write_atomic
from transfusion_jax.parallel.mesh import host_block, make_mesh
from transfusion_jax.parallel.rules import batch_sharding, replicated
from transfusion_jax.training.checkpoint import Checkpoints, Report
from transfusion_jax.training.directory import check_directory
from transfusion_jax.training.loop import Work, on_devices, take_steps
from transfusion_jax.training.monitor import Monitor
from transfusion_jax.training.watchdog import StopSignal, TrainingFailed

PREFETCH = 8  # batches read ahead of the step
SHOWN = 16  # held-out pictures on a PNG
MEASURED = 5_000  # held-out pictures that are measured, at most


def load_judges(experiment: AutoencoderExperiment, report: Report) -> Judges:
    """The networks of the LPIPS and ID terms; says which terms training goes on without.

    Raises:
      ValueError: the weights of a term that is asked for cannot be had.
    """
    loss, size, channels = experiment.loss, experiment.model.size, experiment.model.channels
    perceptual = losses.load_lpips(loss.lpips_network, size) if loss.lpips else None
    identity = None
    if loss.identity and loss.identity_weights:
        identity = resnet.load_resnet(Path(loss.identity_weights))
    elif loss.identity:
        report("no loss.identity_weights: training goes on without the ID term")
    if perceptual is None:
        report("loss.lpips=0: the summary will have no reconstruction_fid_lpips")
    require(
        channels in (1, 3) or (perceptual, identity) == (None, None),
        f"LPIPS and ID compare pictures of 1 or 3 channels, not model.channels={channels}",
    )
    return Judges(perceptual, identity)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    experiment: AutoencoderExperiment
    directory: Path
    mesh: Mesh
    blueprint: Blueprint
    judges: Judges
    held_out: Sequence[np.ndarray]
    checkpoints: Checkpoints
    state: State | None
    train_seconds: float
    fingerprint: str

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.blueprint.abstract.parameters))

    def description(self) -> str:
        """What is being trained, on what, for how long."""
        config, start = self.experiment, 0 if self.state is None else int(self.state.step)
        model, latent = config.model, config.model.size // config.model.downsampling
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return "\n".join([
            f'{config.name}: a "{model.kind}" autoencoder of {self.parameters:,} parameters, '
            f"{model.size}x{model.size}x{model.channels} -> {latent}x{latent}x{model.latent_channels}",
            f"  data      {config.data}: {len(pictures(config, 'train'))} pictures, {len(self.held_out)} held out",
            f"  training  {config.train.steps - start} of {config.train.steps} steps of {config.train.batch} pictures",
            f"  devices   {len(jax.devices())} {jax.devices()[0].platform} ({mesh})",
            f"  run       {self.directory}",
            "compiling the training step; time left is shown from the second step on",
        ])  # fmt: skip


def open_run(experiment: AutoencoderExperiment, directory: Path, report: Report) -> Run:
    """Opens a new run, or the one that is in `directory`, after checking all that can be checked before a step.

    Raises:
      ValueError: something in the experiment cannot work on this machine; the directory belongs to another
        experiment, or is no run directory; or the pictures under the run have changed.
      CheckpointError: the run has checkpoints, and none can be read.
    """
    mesh = make_mesh(experiment.mesh)
    host_block(batch_sharding(mesh), experiment.train.batch, "train.batch")
    check_directory(experiment, directory)
    held_out, digest = pictures(experiment, "held_out"), fingerprint(pictures(experiment, "train"))
    judges = jax.device_put(load_judges(experiment, report), replicated(mesh))
    plan = blueprint(experiment, mesh)
    if not (directory / "config.json").exists() and jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "config.json", stored_config.dumps(experiment).encode())
    checkpoints = Checkpoints(directory / "checkpoints", experiment.train.keep_checkpoints, report)
    state, seconds = None, 0.0
    if restored := checkpoints.restore(plan.abstract):
        state, progress = restored
        found, seconds = progress["data"], float(progress["train_seconds"])
        require(
            found == digest, f"the pictures under {directory} have changed since it was trained"
        )
    return Run(
        experiment, directory, mesh, plan, judges, held_out, checkpoints, state, seconds, digest
    )


def train_autoencoder(run: Run, report: Report) -> dict[str, Any] | None:
    """Trains to the last step; the summary, or None if a signal stopped it.

    Raises:
      TrainingFailed: too many steps in a row without finite gradients, or the final checkpoint was not written.
    """
    report(run.description())
    try:
        state, seconds, stopped_by = _train(run)
    finally:
        run.checkpoints.close()
    if stopped_by:
        report(
            f"stopped by {stopped_by} at step {int(state.step)}, saved; the same command goes on"
        )
        return None
    report(f"trained {run.experiment.train.steps} steps in {seconds:.0f} s")
    return _finish(run, state, seconds)


def _train(run: Run) -> tuple[State, float, str | None]:
    """The last state, the seconds of training over all restarts, and the signal that ended it early."""
    settings, begin = run.experiment.train, time.perf_counter() - run.train_seconds
    state = run.blueprint.initialise() if run.state is None else run.state
    if (start := int(state.step)) >= settings.steps:
        return state, run.train_seconds, None
    seconds = lambda: time.perf_counter() - begin  # noqa: E731
    step_fn, sharding = compiled_step(run.blueprint), batch_sharding(run.mesh)
    reconstruct = Reconstructor(run.blueprint)

    def show(step: int, state: State) -> None:
        if step % settings.sample_every == 0 and jax.process_index() == 0:
            _show(run, reconstruct, state, f"step_{step:07}")

    work = Work(
        step=lambda state, batch: step_fn(
            state, run.judges, on_devices(batch, sharding, settings.batch)
        ),
        batches=read(
            batches(run.experiment, *host_block(sharding, settings.batch)), start, PREFETCH
        ),
        save=lambda state: run.checkpoints.save(
            state, {"train_seconds": seconds(), "data": run.fingerprint}
        ),
        after=show,
    )
    with (
        StopSignal() as stop,
        Monitor(run.directory, settings, start, settings.batch, "images") as monitor,
    ):
        state, stopped_by = take_steps(work, state, settings, monitor, stop)
    if not run.checkpoints.wait():
        raise TrainingFailed(
            f"trained to step {int(state.step)}, but its checkpoint could not be saved"
        )
    return state, seconds(), stopped_by


class Reconstructor:
    """Pictures through the latents' means, or through the codes, and back; on one device of this process."""

    def __init__(self, plan: Blueprint):
        def reconstruct(parameters, image_Bhwc):
            model = nnx.merge(plan.graph, parameters)
            if plan.experiment.model.kind == "kl":
                gaussian = model.encode(image_Bhwc)
                return (
                    model.decode(gaussian.mean),
                    gaussian.mean,
                    jnp.exp(gaussian.log_variance),
                    None,
                )
            quantized = model.quantizer(model.features(image_Bhwc))
            return (
                model.decode(quantized.latent),
                quantized.latent,
                jnp.zeros_like(quantized.latent),
                quantized.codes,
            )

        self._jitted = jax.jit(reconstruct)

    def __call__(self, parameters: Any, image_Bhwc: np.ndarray) -> tuple:
        """Reconstruction, mean and variance of the latents, and codes or None."""
        return self._jitted(parameters, image_Bhwc)

    @staticmethod
    def parameters(state: State) -> Any:
        """The averaged weights, on one device of this process."""
        return jax.device_put(jax.device_get(state.ema), jax.local_devices()[0])


def _show(run: Run, reconstruct: Reconstructor, state: State, name: str) -> None:
    images = np.stack([run.held_out[i] for i in range(min(SHOWN, len(run.held_out)))])
    found = reconstruct(reconstruct.parameters(state), images)[0]
    write_grid(run.directory / "samples" / f"{name}.png", images, jnp.clip(found, -1.0, 1.0))


def _finish(run: Run, state: State, seconds: float) -> dict[str, Any]:
    """Measures the averaged weights on held-out pictures, and writes what a run ends with."""
    reconstruct = Reconstructor(run.blueprint)
    parameters = reconstruct.parameters(state)
    means, variances, codes = [], [], []

    def through(image: np.ndarray) -> jax.Array:
        reconstruction, mean, variance, indices = reconstruct(parameters, image)
        means.append(np.asarray(mean))
        variances.append(np.asarray(variance))
        codes.append(indices)
        return reconstruction

    perceptual = jax.device_put(jax.device_get(run.judges.lpips), jax.local_devices()[0])
    features = (
        None if perceptual is None else jax.jit(lambda x: losses.pooled_features(perceptual, x))
    )
    scores = compare(through, _held_out(run), features)
    # Of what the model is fed: the means' own variance, and that of the samples about them.
    deviation = float(np.sqrt(np.concatenate(means).var() + np.concatenate(variances).mean()))
    if codes[0] is not None:
        use = quantizer.usage(jnp.concatenate(codes), run.experiment.model.codes)
        scores |= {"codebook_use": float(use.share), "codebook_perplexity": float(use.perplexity)}
    summary = {
        **scores,
        "latent_scale": 1.0 / deviation,
        "parameters": run.parameters,
        "steps": run.experiment.train.steps,
        "train_seconds": round(seconds, 1),
    }
    if jax.process_index() == 0:
        _show(run, reconstruct, state, "reconstructions")
        save_codec(
            run.directory / "autoencoder", run.experiment.model, parameters, 1.0 / deviation, 0.0
        )
        write_atomic(
            run.directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode()
        )
    return summary


def _held_out(run: Run) -> Iterator[np.ndarray]:
    """Held-out pictures in batches."""
    count, size = min(MEASURED, len(run.held_out)), run.experiment.train.batch
    for at in range(0, count, size):
        yield np.stack([run.held_out[i] for i in range(at, min(at + size, count))])
