"""AdamW with global-norm clipping, linear warm-up and cosine decay (section 4.1; `recipe` defaults in config)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from transfusion_jax.config import OptimizerConfig
from transfusion_jax.errors import require
from transfusion_jax.parallel.rules import constrain

Metrics = dict[str, Array]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up, then a cosine to the final rate at `steps`."""
    require(
        config.warmup_steps <= steps,
        f"optimizer.warmup_steps={config.warmup_steps} must not exceed train.steps={steps}",
    )
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    floor = config.final_learning_rate / config.learning_rate
    decay = optax.cosine_decay_schedule(
        config.learning_rate, max(steps - config.warmup_steps, 1), floor
    )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, steps: int, parameters: nnx.State, start: int = 0
) -> optax.GradientTransformation:
    """The optimizer for nested dicts of arrays shaped like `parameters`, whose axis names say what decays.

    One that takes its first step at step `start` of the run has the rate of the others from then on.
    """
    rate = learning_rate(config, steps)
    axes = {path: p.get_metadata("out_sharding") for path, p in nnx.to_flat_state(parameters)}
    matrices = {path: len(names) > 1 and "norm" not in names for path, names in axes.items()}
    decayed = nnx.to_pure_dict(nnx.from_flat_state(matrices))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: rate(count + start), config.b1, config.b2, config.epsilon,
            weight_decay=config.weight_decay, mask=decayed,
        ),
    )  # fmt: skip


def accumulated(function: Callable[..., Any], arrays: Any, parts: int, nothing: Any) -> Any:
    """The sum of `function(*part)` over equal parts of the rows of `arrays`, one after another, from `nothing` on.

    Part p takes the rows p, p + parts, p + 2 parts, ...: some of every device's, so none has to move.
    """
    if parts == 1:
        return function(*arrays)

    def part(x):
        x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def add(total, arrays):
        return jax.tree.map(jnp.add, total, function(*arrays)), None

    return jax.lax.scan(add, nothing, jax.tree.map(part, arrays))[0]


def average(ema: Any, parameters: Any, taken: Array, decay: float) -> Any:
    """The moving average after `taken` earlier steps; quick at first, so that it forgets the initial weights."""
    taken = taken.astype(jnp.float32)
    return optax.incremental_update(
        parameters, ema, 1.0 - jnp.minimum(decay, (1.0 + taken) / (10.0 + taken))
    )


def choose(condition: Array, new: Any, old: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
