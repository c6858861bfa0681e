"""Reading: how likely the text before an image is behind it, as a caption of it."""

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.rows import IMAGE, Rows, add_image, feed
from transfusion_jax.model.interface import Context, Model

BLOCK = 16
"""Tokens read at a time."""


def text_lengths(rows: Rows) -> Array:
    """Tokens [B] of each row's text since its last image; 0 for rows that are not in IMAGE."""
    return jnp.where(rows.status_B == IMAGE, rows.length_B - 1 - rows.text_start_B, 0)


def text_likelihood(
    model: Model, rows: Rows, image_Bhwc: Array, experiment: Experiment, tokenizer: Tokenizer
) -> Array:
    """Log-likelihood [B] of each row's text since its last image, and of an end behind it, when an
    image takes the place before it.

    Of a row `<s> two cats BOI` it is that of `<s> BOI image EOI two cats </s>`, which training
    shows as `data.image_first` says; what comes before the text stays before the image. 0 where
    there is no text, and for rows that are not in IMAGE.
    """
    boi_B = jnp.full_like(rows.length_B, tokenizer.boi)
    every_B = jnp.ones(boi_B.shape, bool)
    count_B1 = text_lengths(rows)[:, None]
    image_first = feed(model, rows._replace(length_B=rows.text_start_B), boi_B, advance_B=every_B)
    image_first = add_image(
        model, image_first, image_Bhwc, experiment, tokenizer, advance_B=every_B
    )

    def step(carry: tuple[Array, Context, Array]) -> tuple[Array, Context, Array]:
        first, read, total_B = carry
        number_1T = first + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
        at_BT = rows.text_start_B[:, None] + number_1T
        token_BT = jnp.take_along_axis(rows.tokens_BL, at_BT, axis=1, mode="clip")
        token_BT = jnp.where(number_1T < count_B1, token_BT, tokenizer.eos)
        hidden_BTD, cache = model.extend(token_BT, read)
        before_BTD = jnp.concatenate([read.hidden_BD[:, None], hidden_BTD[:, :-1]], axis=1)
        log_BTV = jax.nn.log_softmax(model.logits(before_BTD))
        log_BT = jnp.take_along_axis(log_BTV, token_BT[..., None], axis=2)[..., 0]
        counts_BT = (number_1T <= count_B1) & (count_B1 > 0)
        total_B += jnp.where(counts_BT, log_BT, 0.0).sum(axis=1)
        return first + BLOCK, Context(cache, read.length_B + BLOCK, hidden_BTD[:, -1]), total_B

    def left(carry: tuple[Array, Context, Array]) -> Array:
        return (carry[0] <= count_B1).any()

    start = jnp.int32(0), image_first.context, jnp.zeros(boi_B.shape)
    return jax.lax.while_loop(left, step, start)[2]
