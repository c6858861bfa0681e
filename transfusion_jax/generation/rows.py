"""The rows of a batch: what each has in the cache, and what it does next.

A row is a request that is being answered. In TEXT it samples tokens until EOS or BOI. In IMAGE,
after BOI, it draws one image, then adds EOI and is back in TEXT. Then it is DONE. Rows move through
these states at their own pace: a phase runs on all rows, but changes only those in its state.
Whatever it writes into the cache of the others lies past their length, where no interval reaches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, ModelConfig
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.model.interface import Context, Model
from transfusion_jax.model.transformer import KVCache

TEXT, IMAGE, DONE = 0, 1, 2


class Rows(NamedTuple):
    cache: KVCache
    length_B: Array
    """Entries of the cache that count."""
    tokens_BL: Array
    """The tokens of these entries; any number at patches."""
    text_start_B: Array
    """Where the text since the last image begins, or that of the document behind `<s>`."""
    hidden_BD: Array
    """Hidden states at the last entry."""
    status_B: Array
    """TEXT, IMAGE or DONE."""
    key_B: Array
    """Of all of a row's random draws; each folds in where it takes place."""

    @property
    def context(self) -> Context:
        return Context(self.cache, self.length_B, self.hidden_BD)

    @property
    def place_key_B(self) -> Array:
        """Keys of what each row draws at its next position."""
        return jax.vmap(jax.random.fold_in)(self.key_B, self.length_B)


def cache_bytes(model: ModelConfig, capacity: int) -> int:
    """Of a row with so many positions."""
    cache = jax.eval_shape(lambda: KVCache.zeros(model, 1, capacity))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def start(
    model: Model,
    batch: Batch,
    length_B: Array,
    key_B: Array,
    *,
    capacity: int,
    timestep: int,
    eoi: int,
    boi: int | None = None,
) -> Rows:
    """Reads the prompts, whose images are seen at `timestep`, into a cache of `capacity`
    positions; with `boi`, adds it, and every row is in IMAGE."""
    t_BM = jnp.full_like(batch.image_start_BM, timestep)
    hidden_BLD, cache = model.read(batch, t_BM, model.new_cache(len(length_B), capacity))
    at_1L = jnp.arange(batch.tokens_BL.shape[1], dtype=jnp.int32)[None, :]
    last_image_B = jnp.where(batch.tokens_BL == eoi, at_1L, 0).max(axis=1)  # `<s>` is at 0
    last_B1D = jnp.take_along_axis(hidden_BLD, (length_B - 1)[:, None, None], axis=1)
    rows = Rows(
        cache,
        length_B,
        jnp.pad(batch.tokens_BL, ((0, 0), (0, capacity - at_1L.shape[1]))),
        last_image_B + 1,
        last_B1D[:, 0],
        jnp.full_like(length_B, TEXT),
        key_B,
    )
    if boi is None:
        return rows
    rows = feed(model, rows, jnp.full_like(length_B, boi), advance_B=jnp.ones_like(length_B, bool))
    return rows._replace(status_B=jnp.full_like(length_B, IMAGE))


def feed(model: Model, rows: Rows, token_B: Array, *, advance_B: Array) -> Rows:
    """Adds one token to the rows in `advance`."""
    hidden_B1D, cache = model.extend(token_B[:, None], rows.context)
    at_1L = jnp.arange(rows.tokens_BL.shape[1])[None, :]
    here_BL = at_1L == rows.length_B[:, None]
    return rows._replace(
        cache=cache,
        length_B=rows.length_B + advance_B.astype(jnp.int32),
        tokens_BL=jnp.where(here_BL, token_B[:, None], rows.tokens_BL),
        hidden_BD=jnp.where(advance_B[:, None], hidden_B1D[:, 0], rows.hidden_BD),
    )


def add_image(
    model: Model,
    rows: Rows,
    image_Bhwc: Array,
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    advance_B: Array,
) -> Rows:
    """Adds a finished image, and EOI, to the rows in `advance`, which end in BOI."""
    cache = model.show(image_Bhwc, rows.context, experiment.sampler.context_timestep)
    added_B = jnp.where(advance_B, experiment.image.patches, 0)
    rows = rows._replace(cache=cache, length_B=rows.length_B + added_B)
    eoi_B = jnp.full_like(rows.length_B, tokenizer.eoi)
    return feed(model, rows, eoi_B, advance_B=advance_B)
