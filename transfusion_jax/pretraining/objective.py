"""The objective: what a model's losses of single examples add up to.

For Transfusion that is L = L_LM + lambda * L_DDPM (section 3.3).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import TrainConfig
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.interface import Model
from transfusion_jax.shapes import Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """`total` is minimised; `text` and `image` are the means of these names, 0 where a model has
    none."""

    total: Scalar
    text: Scalar
    image: Scalar


def batch_losses(
    model: Model, microbatch: Batch, batch: Batch, noise: Noise, train: TrainConfig
) -> Losses:
    """The share that a microbatch has in the losses of its global batch.

    Sums of losses over the microbatch, divided by the weights of the whole batch: the losses, and
    the gradient, of a batch are the sum of those of its microbatches. A mean over nothing is 0.
    """
    means = weighted_means(
        model.losses(microbatch, noise, train.vocab_chunk),
        model.weights(microbatch),
        model.weights(batch),
    )
    scales = model.coefficients(train)
    # What has no part in the total costs nothing: XLA leaves it out.
    total = sum(scale * means[name] for name, scale in scales.items() if scale)
    nothing = jnp.zeros(())
    return Losses(total, means.get("text", nothing), means.get("image", nothing))


def weighted_means(
    losses: dict[str, Array], weights: dict[str, Array], all_weights: dict[str, Array]
) -> dict[str, Array]:
    """For every name, the sum of loss * weight over the sum of all weights, or over 1 if that is
    less."""
    return {
        name: jnp.sum(loss * weights[name]) / jnp.maximum(jnp.sum(all_weights[name]), 1.0)
        for name, loss in losses.items()
    }
