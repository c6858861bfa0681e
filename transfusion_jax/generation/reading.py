"""Reading: how likely the text before an image is behind it, as a caption of it."""

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.rows import IMAGE, Rows, add_image, feed
from transfusion_jax.model.interface import Model


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
    count_B = jnp.where(rows.status_B == IMAGE, rows.length_B - 1 - rows.text_start_B, 0)
    image_first = feed(model, rows._replace(length_B=rows.text_start_B), boi_B, advance_B=every_B)
    image_first = add_image(
        model, image_first, image_Bhwc, experiment, tokenizer, advance_B=every_B
    )

    def step(carry: tuple[Array, Rows, Array]) -> tuple[Array, Rows, Array]:
        i, reading, total_B = carry
        at_B1 = (rows.text_start_B + i)[:, None]
        token_B = jnp.take_along_axis(rows.tokens_BL, at_B1, axis=1, mode="clip")[:, 0]
        token_B = jnp.where(i < count_B, token_B, tokenizer.eos)
        log_BV = jax.nn.log_softmax(model.logits(reading.hidden_BD[:, None])[:, 0])
        log_B = jnp.take_along_axis(log_BV, token_B[:, None], axis=1)[:, 0]
        counts_B = (i <= count_B) & (count_B > 0)
        reading = feed(model, reading, token_B, advance_B=i < count_B)
        return i + 1, reading, total_B + jnp.where(counts_B, log_B, 0.0)

    def left(carry: tuple[Array, Rows, Array]) -> Array:
        return (carry[0] <= count_B).any()

    start = jnp.int32(0), image_first, jnp.zeros(count_B.shape)
    return jax.lax.while_loop(left, step, start)[2]
