"""Decoding of text: rows sample tokens until EOS, BOI, or their limit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.rows import DONE, IMAGE, TEXT, Rows, feed
from transfusion_jax.model.interface import Model

NO_TOKEN = -1


def write_text(
    model: Model,
    rows: Rows,
    limit_B: Array,
    *,
    experiment: Experiment,
    tokenizer: Tokenizer,
    budget: int,
) -> tuple[Rows, Array]:
    """Rows in TEXT write until they are in IMAGE or DONE.

    Args:
      limit_B: the length at which a row is DONE.
      budget: the most tokens that a row has left.

    Returns:
      The rows, and their text tokens [B, budget + 1], NO_TOKEN elsewhere.
    """
    never_V = never_predicted(experiment.model.vocab_size, tokenizer)
    boi_V = np.arange(experiment.model.vocab_size) == tokenizer.boi
    never_V |= boi_V & (experiment.model.images == "none")

    def step(carry):
        i, rows, tokens_BT = carry
        active_B = rows.status_B == TEXT
        room_B = limit_B - rows.length_B
        no_image_B = room_B < experiment.image.span
        barred_BV = never_V[None, :] | (boi_V[None, :] & no_image_B[:, None])
        logits_BV = model.logits(rows.hidden_BD[:, None])[:, 0]
        logits_BV = jnp.where(barred_BV, -jnp.inf, logits_BV)
        token_B = choose(logits_BV, rows, experiment.sampler.temperature)
        ended_B = (token_B == tokenizer.eos) | (room_B <= 0)
        begins_image_B = token_B == tokenizer.boi
        is_text_B = active_B & ~ended_B & ~begins_image_B
        tokens_BT = tokens_BT.at[:, i].set(jnp.where(is_text_B, token_B, NO_TOKEN))
        status_B = jnp.where(ended_B, DONE, jnp.where(begins_image_B, IMAGE, TEXT))
        rows = feed(model, rows, token_B, advance_B=active_B & ~ended_B)
        rows = rows._replace(status_B=jnp.where(active_B, status_B, rows.status_B))
        return i + 1, rows, tokens_BT

    def writing(carry):
        return (carry[1].status_B == TEXT).any()

    tokens_BT = jnp.full((len(limit_B), budget + 1), NO_TOKEN, jnp.int32)
    _, rows, tokens_BT = jax.lax.while_loop(writing, step, (jnp.int32(0), rows, tokens_BT))
    return rows, tokens_BT


def choose(logits_BV: Array, rows: Rows, temperature: float) -> Array:
    """The next token of every row: the likeliest at temperature 0, else a draw that depends on the
    row's key and length alone."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    token_B = jax.vmap(jax.random.categorical)(rows.place_key_B, logits_BV / temperature)
    return token_B.astype(jnp.int32)


def never_predicted(vocab_size: int, tokenizer: Tokenizer) -> np.ndarray:
    """[V]: BOS and EOI, which are given, and ids beyond the tokenizer's."""
    never_V = np.zeros(vocab_size, bool)
    never_V[[tokenizer.bos, tokenizer.eoi]] = True
    never_V[tokenizer.size :] = True
    return never_V
