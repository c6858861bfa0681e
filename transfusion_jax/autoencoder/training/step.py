"""One step of autoencoder training: pure, `step(state, judges, image) -> (state, metrics)`.

Autoencoder and discriminator learn from the same forward pass. The gradients of the reconstruction
terms and of the GAN term are added at the reconstruction, weighed against each other, and go back
through the autoencoder together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder import quantizer
from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training import losses, resnet
from transfusion_jax.autoencoder.training.gan import Gan, discriminate
from transfusion_jax.autoencoder.training.judges import Judges
from transfusion_jax.autoencoder.training.state import Blueprint, State
from transfusion_jax.autoencoder.vae import LAST_KERNEL
from transfusion_jax.metrics.psnr import psnr
from transfusion_jax.training.state import compiled
from transfusion_jax.training.update import (
    Metrics,
    advance,
    learning_rate,
    step_key,
    updated,
    updates_made,
)


class Codes(NamedTuple):
    """What a "vq" autoencoder quantised."""

    latents: Array
    indices: Array
    """Of the codes."""


class Learned(NamedTuple):
    """What a step has learned from a batch."""

    gradients: Any
    """Of the autoencoder's parameters."""
    loss: Array
    gan: Gan
    codes: Codes | None
    metrics: Metrics


def train_step(blueprint: Blueprint) -> Callable[[State, Judges, Array], tuple[State, Metrics]]:
    """The step of an experiment; jit it once, with the state donated (`compiled_step`).

    The latents' noise comes from (seed, step).
    """
    experiment = blueprint.experiment
    settings = experiment.train
    rate = learning_rate(experiment.optimizer, settings.steps)

    def step(state: State, judges: Judges, image_Bhwc: Array) -> tuple[State, Metrics]:
        key = step_key(settings.seed, state.step)
        learned = _learn(blueprint, state, judges, image_Bhwc, key)
        norm = optax.tree.norm(learned.gradients)
        new = updated(state, blueprint.optimizer, learned.gradients, settings.ema_decay)
        new |= {
            "discriminator": learned.gan.discriminator,
            "discriminator_optimizer": learned.gan.optimizer,
        }
        if state.counts is not None:
            new |= _revived(experiment, learned.codes, state, new, key)
        current_rate = rate(updates_made(state))
        new_state, counts = advance(state, new, learned.loss, norm, learned.gan.norm)
        return new_state, {
            **learned.metrics,
            "loss": learned.loss,
            "grad_norm": norm,
            "learning_rate": current_rate,
            **counts,
        }

    return step


def compiled_step(blueprint: Blueprint) -> Callable[[State, Judges, Array], tuple[State, Metrics]]:
    """`train_step`, jitted: the state is donated and keeps its placement."""
    return compiled(train_step(blueprint), blueprint.abstract)


def _learn(
    blueprint: Blueprint, state: State, judges: Judges, image_Bhwc: Array, key: Array
) -> Learned:
    """Forward, the terms of the loss, and back; the discriminator makes its update on the way."""
    forward = functools.partial(_forward, blueprint, image_Bhwc, key)
    outputs, backward, codes = jax.vjp(forward, state.parameters, has_aux=True)
    reconstruction_Bhwc, divergence_B = outputs
    terms = functools.partial(_terms, blueprint.experiment, judges, image_Bhwc)
    (loss, metrics), (at_reconstruction, at_divergence) = jax.value_and_grad(
        terms, (0, 1), has_aux=True
    )(reconstruction_Bhwc, divergence_B)

    def at_last_kernel(gradient_Bhwc: Array) -> Array:
        (gradients,) = backward((gradient_Bhwc, jnp.zeros_like(divergence_B)))
        return functools.reduce(lambda tree, name: tree[name], LAST_KERNEL, gradients)

    gan = discriminate(blueprint, state, image_Bhwc, reconstruction_Bhwc)
    weight = losses.adaptive_weight(at_last_kernel(at_reconstruction), at_last_kernel(gan.gradient))
    weight = blueprint.experiment.loss.gan * jax.lax.stop_gradient(weight)
    (gradients,) = backward((at_reconstruction + weight * gan.gradient, at_divergence))
    if blueprint.discriminator_graph is not None:
        metrics |= gan.metrics(weight)
    metrics |= _code_metrics(blueprint.experiment, codes)
    return Learned(gradients, loss + weight * gan.term, gan, codes, metrics)


def _forward(
    blueprint: Blueprint, image_Bhwc: Array, key: Array, parameters: Any
) -> tuple[tuple[Array, Array], Codes | None]:
    """Reconstruction, KL or codebook loss of the latents [B], and the codes of a "vq" model."""
    model = nnx.merge(blueprint.graph, parameters)
    if blueprint.experiment.model.kind == "kl":
        gaussian = model.encode(image_Bhwc)
        return (model.decode(gaussian.sample(key)), losses.kl(gaussian.kl(), image_Bhwc)), None
    latents = model.features(image_Bhwc)
    quantized = model.quantizer(latents, blueprint.experiment.loss.commitment)
    return (model.decode(quantized.latent), quantized.loss_B), Codes(latents, quantized.codes)


def _terms(
    experiment: AutoencoderExperiment,
    judges: Judges,
    image_Bhwc: Array,
    reconstruction_Bhwc: Array,
    divergence_B: Array,
) -> tuple[Array, Metrics]:
    """The loss without its GAN term, and the mean of each term for the log."""
    terms = {}
    if experiment.loss.l1:
        terms["l1"] = losses.l1(image_Bhwc, reconstruction_Bhwc)
    if judges.lpips is not None:
        terms["lpips"] = losses.lpips(judges.lpips, image_Bhwc, reconstruction_Bhwc)
    if judges.identity is not None:
        terms["identity"] = resnet.identity(judges.identity, image_Bhwc, reconstruction_Bhwc)
    terms["kl" if experiment.model.kind == "kl" else "codebook"] = divergence_B
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    metrics["psnr"] = jnp.mean(psnr(image_Bhwc, jax.lax.stop_gradient(reconstruction_Bhwc)))
    return jnp.mean(losses.weighted(experiment.loss, terms)), metrics


def _revived(
    experiment: AutoencoderExperiment, codes: Codes, state: State, new: dict[str, Any], key: Array
) -> dict[str, Any]:
    """Every `revive_every` steps, moves unused codes and their averages to latents of a batch."""
    counts = state.counts + quantizer.count(codes.indices, experiment.model.codes)
    due = (state.step + 1) % experiment.loss.revive_every == 0
    considered = jnp.where(due, counts, 1)
    book = new["parameters"]["quantizer"]["codebook"]
    book = quantizer.revive(book, codes.latents, considered, key)
    average_book = new["ema"]["quantizer"]["codebook"]
    average_book = jnp.where((considered == 0)[:, None], book, average_book)
    return {
        "parameters": new["parameters"] | {"quantizer": {"codebook": book}},
        "ema": new["ema"] | {"quantizer": {"codebook": average_book}},
        "counts": jnp.where(due, 0, counts),
    }


def _code_metrics(experiment: AutoencoderExperiment, codes: Codes | None) -> Metrics:
    """How much of the codebook the batch used."""
    if codes is None:
        return {}
    use = quantizer.usage(codes.indices, experiment.model.codes)
    return {"codebook_use": use.share, "codebook_perplexity": use.perplexity}
