"""Images cut into square patches, and put together again."""

import jax.numpy as jnp
from jax import Array


def patchify(image: Array, patch: int) -> Array:
    """[..., h, w, c] -> [..., P, Z]: patches left to right, top to bottom; the values of a patch by
    row, column, channel."""
    *lead, h, w, c = image.shape
    x = image.reshape(*lead, h // patch, patch, w // patch, patch, c)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Array, shape: tuple[int, int, int], patch: int) -> Array:
    """The inverse of `patchify`: [..., P, Z] -> [..., h, w, c] with `shape` = (h, w, c)."""
    h, w, c = shape
    lead = patches.shape[:-2]
    x = patches.reshape(*lead, h // patch, w // patch, patch, patch, c)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, h, w, c)
