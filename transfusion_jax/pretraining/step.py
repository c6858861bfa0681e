"""One optimisation step as a pure function: `step(state, batch) -> (state, metrics)`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from transfusion_jax.batch import Batch
from transfusion_jax.diffusion.process import draw_training_noise
from transfusion_jax.pretraining.objective import Losses, batch_losses
from transfusion_jax.pretraining.state import Blueprint, State
from transfusion_jax.training.update import Metrics, accumulated, average, choose, learning_rate


def train_step(blueprint: Blueprint) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of an experiment; jit it once, with the state donated (`compiled_step`).

    Timesteps and noise of row b come from (seed, step, b). A step whose loss or gradients are not finite
    changes nothing but the counters.
    """
    experiment = blueprint.experiment
    rate = learning_rate(experiment.optimizer, experiment.train.steps)

    def loss(parameters, batch, microbatch, noise):
        model = nnx.merge(blueprint.graph, parameters)
        losses = batch_losses(model, microbatch, batch, noise, experiment.train)
        return losses.total, losses

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
        noise = draw_training_noise(key, batch.image_limit_BM, batch.latents_BMhwc)
        differentiate = functools.partial(jax.grad(loss, has_aux=True), state.parameters, batch)
        nothing = jax.tree.map(jnp.zeros_like, state.parameters), Losses(*jnp.zeros(3))
        arrays = batch, noise
        gradients, losses = accumulated(
            differentiate, arrays, experiment.train.accumulation, nothing
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(losses.total)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer counts
            updates, optimizer = blueprint.optimizer.update(
                gradients, state.optimizer, state.parameters
            )
            current_rate = rate(state.step - state.skipped)
        parameters = optax.apply_updates(state.parameters, updates)
        ema = average(state.ema, parameters, state.step - state.skipped, experiment.train.ema_decay)

        keep = lambda new, old: choose(finite, new, old)  # noqa: E731
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = State(
            step=state.step + 1,
            parameters=keep(parameters, state.parameters),
            ema=keep(ema, state.ema),
            optimizer=keep(optimizer, state.optimizer),
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        return new_state, {
            "loss": losses.total,
            "text_loss": losses.text,
            "image_loss": losses.image,
            "grad_norm": norm,
            "learning_rate": current_rate,
            "skipped": new_state.skipped,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }

    return step


def compiled_step(blueprint: Blueprint) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """`train_step`, jitted: the state is donated and keeps its placement."""
    placement = jax.tree.map(lambda x: x.sharding, blueprint.abstract)
    return jax.jit(train_step(blueprint), donate_argnums=0, out_shardings=(placement, None))
