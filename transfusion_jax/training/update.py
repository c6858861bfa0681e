"""From gradients to the next state: optimizer, moving average, skipped steps, accumulation.

Pure functions on the arrays of any network: AdamW with global-norm clipping, linear warm-up and
cosine decay (Transfusion, arXiv 2408.11039, section 4.1); or Muon in its place.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from transfusion_jax.config import OptimizerConfig
from transfusion_jax.errors import require
from transfusion_jax.parallel.rules import constrain
from transfusion_jax.training.frozen import like, merged, without
from transfusion_jax.training.state import AnyState

Metrics = dict[str, Array]
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates at rate 1, as usually seen (Liu et al. 2025, arXiv
2502.16982, section 2.2)."""


def step_key(seed: int, step: Array) -> Array:
    """The key of everything that is drawn at a step."""
    return jax.random.fold_in(jax.random.key(seed), step)


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Array], Array]:
    """The rate after a number of updates.

    Linear from 0 to the peak over the warm-up, then a cosine to the final rate at `steps`.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    require(
        config.warmup_steps <= steps,
        f"optimizer.warmup_steps={config.warmup_steps} must not exceed train.steps={steps}",
    )
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    floor = config.final_learning_rate / config.learning_rate
    decay = optax.cosine_decay_schedule(
        config.learning_rate, max(steps - config.warmup_steps, 1), floor
    )
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps])

    def rate(updates: Array) -> Array:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer counts
            return schedule(updates)

    return rate


def decayed(parameters: nnx.State) -> dict:
    """Whether weight decay shrinks each parameter: matrices yes, vectors and norm scales no.

    A nested dict like `nnx.to_pure_dict(parameters)`.
    """
    axes = {path: p.get_metadata("out_sharding") for path, p in nnx.to_flat_state(parameters)}
    matrices = {path: len(names) > 1 and "norm" not in names for path, names in axes.items()}
    return nnx.to_pure_dict(nnx.from_flat_state(matrices))


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    parameters: nnx.State,
    start: int = 0,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """The optimizer for nested dicts shaped like `parameters`, whose axis names say what decays.

    One that makes its first update at step `start` of the run has the same rate as the others from
    then on. It is begun with all parameters, and updates those that are not in `frozen`.
    """
    rate = learning_rate(config, steps)

    def at(updates: Array) -> Array:
        return rate(updates + start)

    decay = without(decayed(parameters), frozen)
    if config.kind == "muon":
        axes = without(matrices(parameters), frozen)
        muon = optax.contrib.muon(
            learning_rate=1.0,
            eps=config.epsilon,
            beta=config.momentum,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=axes,
            consistent_rms=ADAMW_RMS,
        )
        direction = muon._replace(
            update=lambda gradients, *others: muon.update(_in_layers(axes, gradients), *others)
        )
        # Not by `muon`, which lets everything decay that it leaves to AdamW.
        decay = optax.add_decayed_weights(-config.weight_decay, decay)
        update = optax.chain(direction, decay, optax.scale_by_schedule(at))
    else:
        update = optax.adamw(
            at, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decay
        )
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return optimizer._replace(init=lambda tree: optimizer.init(without(tree, frozen)))


def matrices(parameters: nnx.State) -> dict:
    """The axes of inputs and outputs of every matrix inside a layer, None for other parameters.

    A nested dict like `nnx.to_pure_dict(parameters)`; layers are stacked along the first axis.

    Raises:
      ValueError: there is none.
    """

    def axes(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        if names[0] != "layers" or "norm" in names:
            return None
        inputs = 3 if names[1] in ("heads", "kv_heads") else 2
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, inputs)), tuple(range(inputs, len(names)))
        )

    found = {
        path: axes(p.get_metadata("out_sharding")) for path, p in nnx.to_flat_state(parameters)
    }
    require(any(found.values()), "optimizer.kind='muon' is for transformers: it finds no layers")
    return nnx.to_pure_dict(nnx.from_flat_state(found))


def _in_layers(axes: dict, gradients: dict) -> dict:
    """The gradients of `matrices`, those of whole layers on each device, dealt out to those that
    share the parameters (`fsdp`) or, where none do, to the copies (`data`); where that divides the
    layers and nothing else cuts their matrices. So with `fsdp` no update crosses between slices.

    Muon's products take whole matrices. So a device does them for its layers alone, as in Liu et
    al. 2025 (arXiv 2502.16982, section 2.3), instead of every device for all of them. Devices along
    `tensor` share each product already, and along `sequence` they would all do the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1:
        return gradients
    axis = "fsdp" if mesh.shape["fsdp"] > 1 else "data"

    def cut(axes: optax.contrib.MuonDimensionNumbers | None, gradient: Array) -> Array:
        if axes is None or mesh.shape[axis] == 1 or len(gradient) % mesh.shape[axis]:
            return gradient
        return jax.lax.with_sharding_constraint(gradient, PartitionSpec(axis))

    leaf = (optax.contrib.MuonDimensionNumbers, type(None))
    return jax.tree.map(cut, axes, gradients, is_leaf=lambda x: isinstance(x, leaf))


def descend(
    optimizer: optax.GradientTransformation, gradients: Any, moments: Any, parameters: Any
) -> tuple[Any, Any]:
    """Parameters and the optimizer's own state after one update."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer counts
        updates, moments = optimizer.update(gradients, moments, parameters)
    return optax.apply_updates(parameters, updates), moments


def average(ema: Any, parameters: Any, updates: Array, decay: float) -> Any:
    """The moving average after `updates` earlier ones.

    The decay starts at 1/10 and approaches `decay`, so that the initial weights are soon forgotten.
    """
    updates = updates.astype(jnp.float32)
    return optax.incremental_update(
        parameters, ema, 1.0 - jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
    )


def updates_made(state: Any) -> Array:
    """How often the optimizer has changed the parameters: the steps that were not skipped."""
    return state.step - state.skipped


def updated(
    state: Any, optimizer: optax.GradientTransformation, gradients: Any, ema_decay: float
) -> dict[str, Any]:
    """The fields `parameters`, `ema` and `optimizer` of a state after one update.

    Parameters without a gradient, and their average, stay as they are.
    """
    old, mean = like(state.parameters, gradients), like(state.ema, gradients)
    new, moments = descend(optimizer, gradients, state.optimizer, old)
    mean = average(mean, new, updates_made(state), ema_decay)
    return {
        "parameters": merged(state.parameters, new),
        "ema": merged(state.ema, mean),
        "optimizer": moments,
    }


def advance(
    state: AnyState, new: dict[str, Any], loss: Array, norm: Array, *others: Array
) -> tuple[AnyState, Metrics]:
    """The state one step later, with the fields `new`; and its counts of skipped steps, to log.

    If the loss, the gradients' norm (either can be finite while the other is not) or any of the
    others is not finite, the step is skipped: only the counters change.
    """
    finite = jnp.all(jnp.isfinite(jnp.stack([loss, norm, *others])))
    skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
    counts = {
        "skipped": state.skipped + skipped,
        "skipped_in_a_row": (state.skipped_in_a_row + 1) * skipped,
    }
    kept = {name: _choose(finite, tree, getattr(state, name)) for name, tree in new.items()}
    return replace(state, step=state.step + 1, **kept, **counts), counts


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def accumulated(function: Callable[..., Any], arrays: Any, microbatches: int, zero: Any) -> Any:
    """The sum of `function(*microbatch)` over equal parts of the rows of `arrays`, in turn.

    Less memory, the same gradient. `zero` is the sum over no rows. Of n microbatches, number m has
    the rows m, m + n, m + 2n, ...: some from every device, so no row moves between devices.
    """
    if microbatches == 1:
        return function(*arrays)

    def split(x):
        x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def add(total, arrays):
        return jax.tree.map(jnp.add, total, function(*arrays)), None

    return jax.lax.scan(add, zero, jax.tree.map(split, arrays))[0]
