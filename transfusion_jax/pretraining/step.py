"""One step of pretraining as a pure function: `step(state, batch) -> (state, metrics)`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.diffusion.process import Noise, draw_training_noise
from transfusion_jax.pretraining.objective import Losses, batch_losses
from transfusion_jax.pretraining.state import Blueprint
from transfusion_jax.training.frozen import merged, without
from transfusion_jax.training.state import State, compiled
from transfusion_jax.training.update import (
    Metrics,
    accumulated,
    advance,
    learning_rate,
    step_key,
    updated,
    updates_made,
)

LOOPS_KEEP_SUMS = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
"""Sums over devices stay in the loop over microbatches. XLA for TPU moves them behind it, which has
given wrong gradients of embeddings (libtpu 0.0.48)."""


def train_step(blueprint: Blueprint) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of an experiment; jit it once, with the state donated (`compiled_step`).

    Timesteps and noise of row b come from (seed, step, b).
    """
    experiment = blueprint.experiment
    settings = experiment.train
    rate = learning_rate(experiment.optimizer, settings.steps)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        gradients, losses = _gradients(blueprint, state.parameters, batch, state.step)
        with jax.named_scope("update"):
            norm = optax.tree.norm(gradients)
            new = updated(state, blueprint.optimizer, gradients, settings.ema_decay)
            current_rate = rate(updates_made(state))
            new_state, counts = advance(state, new, losses.total, norm)
        return new_state, {
            "loss": losses.total,
            "text_loss": losses.text,
            "image_loss": losses.image,
            "grad_norm": norm,
            "learning_rate": current_rate,
            **counts,
        }

    return step


def compiled_step(
    blueprint: Blueprint, options: dict[str, str | int] | None = None
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`train_step`, jitted: the state is donated and keeps its placement.

    Args:
      options: of the compiler, beside those that the step needs.
    """
    accumulates = blueprint.experiment.train.accumulation > 1
    on_tpu = blueprint.abstract.step.sharding.mesh.devices.flat[0].platform == "tpu"
    needed = LOOPS_KEEP_SUMS if accumulates and on_tpu else {}
    return compiled(
        train_step(blueprint), blueprint.abstract, {**needed, **(options or {})} or None
    )


def _gradients(
    blueprint: Blueprint, parameters: Any, batch: Batch, step: Array
) -> tuple[Any, Losses]:
    """Gradients of the batch's loss, added up over its microbatches; and its losses.

    What is frozen has none: it is not in their tree.
    """
    settings = blueprint.experiment.train

    def loss(trained: Any, batch: Batch, microbatch: Batch, noise: Noise) -> tuple[Array, Losses]:
        model = nnx.merge(blueprint.graph, merged(parameters, trained))
        losses = batch_losses(model, microbatch, batch, noise, settings)
        return losses.total, losses

    key = step_key(settings.seed, step)
    diffusion = blueprint.experiment.diffusion
    noise = draw_training_noise(key, batch.image_limit_BM, batch.latents_BMhwc, diffusion)
    trained = without(parameters, blueprint.frozen)
    differentiate = functools.partial(jax.grad(loss, has_aux=True), trained, batch)
    zero = jax.tree.map(jnp.zeros_like, trained), Losses(*jnp.zeros(3))
    return accumulated(differentiate, (batch, noise), settings.accumulation, zero)
