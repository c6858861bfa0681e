"""The state of training one network; how any state is placed, made and stepped.

A trainer with more to remember (a second network, counts) declares a frozen dataclass of its own
that has these fields and more: the machine reads `step`, `parameters`, `ema`, `optimizer`,
`skipped` and `skipped_in_a_row` by name, and checkpoints save every field.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding

from transfusion_jax.parallel.rules import replicated

AnyState = TypeVar("AnyState")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that training changes. No random keys: they are folded from (seed, step)."""

    step: Array
    """Steps taken, skipped ones included; also the index of the next batch."""
    parameters: Any
    ema: Any
    """Exponential moving average of the parameters, which is sampled and evaluated."""
    optimizer: Any
    skipped: Array
    """Steps whose loss or gradients were not finite, in all."""
    skipped_in_a_row: Array


def initial_fields(parameters: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """The fields of `State` at step 0."""
    zero = jnp.zeros((), jnp.int32)
    return {
        "step": zero,
        "parameters": parameters,
        # A copy: the step takes over the buffers of both.
        "ema": jax.tree.map(jnp.copy, parameters),
        "optimizer": optimizer.init(parameters),
        "skipped": zero,
        "skipped_in_a_row": zero,
    }


def place(shapes: State, shardings: Any, mesh: Mesh) -> State:
    """`shapes` with a sharding for every array.

    The average is sharded as the parameters are (`shardings`), and so is whatever the optimizer
    remembers of a parameter: under the keys that lead to it. The rest is replicated.
    """
    everywhere = replicated(mesh)
    of_parameters = {
        _keys(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)
    }

    def remembered(path: tuple, _: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = _keys(path)
        ends = (keys[start:] for start in range(len(keys)))
        return next((of_parameters[end] for end in ends if end in of_parameters), everywhere)

    moments = jax.tree.map_with_path(remembered, shapes.optimizer)
    return with_shardings(
        shapes, State(everywhere, shardings, shardings, moments, everywhere, everywhere)
    )


def _keys(path: tuple) -> tuple:
    """The keys of the dicts along a path."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def with_shardings(shapes: AnyState, shardings: Any) -> AnyState:
    """Shapes and dtypes with their shardings, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def initialise(
    initial_state: Callable[..., AnyState], abstract: AnyState, *arrays: Any
) -> AnyState:
    """The state that `initial_state(*arrays)` makes, each array made on the devices that keep it;
    it takes over the buffers of `arrays`."""
    donated = tuple(range(len(arrays)))
    made = jax.jit(initial_state, out_shardings=_shardings(abstract), donate_argnums=donated)
    return made(*arrays)


def compiled(
    step: Callable[..., Any], abstract: Any, options: dict[str, str | int] | None = None
) -> Callable[..., Any]:
    """`step(state, ...) -> (state, metrics)`, jitted with options of the compiler: the state is
    donated and stays sharded."""
    shardings = _shardings(abstract), None
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)
