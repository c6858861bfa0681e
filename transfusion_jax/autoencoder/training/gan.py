"""The discriminator's part in a step: the GAN term of the autoencoder, and its own update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.training import losses
from transfusion_jax.autoencoder.training.state import Blueprint, State
from transfusion_jax.training.update import Metrics, descend


class Gan(NamedTuple):
    """What a step has of the discriminator."""

    term: Array
    """The GAN term, without its weights."""
    gradient: Array
    """Of `term`, at the reconstruction."""
    loss: Array
    """The discriminator's own."""
    norm: Array
    """Of the discriminator's gradients; 0 while it is idle."""
    discriminator: Any
    """Its parameters after the update."""
    optimizer: Any

    def metrics(self, weight: Array) -> Metrics:
        """For the log; `weight` is that of the term in the autoencoder's loss."""
        return {
            "gan": self.term,
            "gan_weight": jnp.where(self.norm > 0, weight, 0.0),
            "discriminator": self.loss,
        }


def discriminate(
    blueprint: Blueprint, state: State, image_Bhwc: Array, reconstruction_Bhwc: Array
) -> Gan:
    """The GAN term and an update of the discriminator; zeros before step `loss.gan_start`."""
    zero = jnp.zeros((), jnp.float32)
    kept = state.discriminator, state.discriminator_optimizer
    idle = Gan(zero, jnp.zeros_like(reconstruction_Bhwc), zero, zero, *kept)
    if blueprint.discriminator_graph is None:
        return idle

    def active() -> Gan:
        term, gradient = jax.value_and_grad(_term, argnums=2)(
            blueprint, state.discriminator, reconstruction_Bhwc
        )
        loss, gradients = jax.value_and_grad(_loss, argnums=1)(
            blueprint, state.discriminator, image_Bhwc, reconstruction_Bhwc
        )
        learned = descend(
            blueprint.discriminator_optimizer,
            gradients,
            state.discriminator_optimizer,
            state.discriminator,
        )
        return Gan(term, gradient, loss, optax.tree.norm(gradients), *learned)

    return jax.lax.cond(state.step >= blueprint.experiment.loss.gan_start, active, lambda: idle)


def _term(blueprint: Blueprint, parameters: Any, reconstruction_Bhwc: Array) -> Array:
    discriminator = nnx.merge(blueprint.discriminator_graph, parameters)
    return jnp.mean(losses.generator_loss(discriminator(reconstruction_Bhwc)))


def _loss(
    blueprint: Blueprint, parameters: Any, image_Bhwc: Array, reconstruction_Bhwc: Array
) -> Array:
    discriminator = nnx.merge(blueprint.discriminator_graph, parameters)
    real_Bhw = discriminator(image_Bhwc)
    fake_Bhw = discriminator(reconstruction_Bhwc)
    return jnp.mean(losses.discriminator_loss(real_Bhw, fake_Bhw))
