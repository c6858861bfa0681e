"""Drawing: rows after BOI draw one image each, the best of several if so asked."""

import jax
import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.guidance import guidance
from transfusion_jax.generation.reading import text_lengths, text_likelihood
from transfusion_jax.generation.rows import IMAGE, TEXT, Rows, add_image
from transfusion_jax.model.interface import Model


def draw_images(
    model: Model, rows: Rows, *, experiment: Experiment, tokenizer: Tokenizer
) -> tuple[Rows, Array]:
    """Rows in IMAGE draw one, add EOI, which is never predicted, and are back in TEXT.

    Returns:
      The rows, and an image [B, h, w, c] for each; those of rows in other states mean nothing.
    """
    drawing_B = rows.status_B == IMAGE
    image_Bhwc = _best(model, rows, experiment, tokenizer)
    rows = add_image(model, rows, image_Bhwc, experiment, tokenizer, advance_B=drawing_B)
    return rows._replace(
        text_start_B=jnp.where(drawing_B, rows.length_B, rows.text_start_B),
        status_B=jnp.where(drawing_B, TEXT, rows.status_B),
    ), image_Bhwc


def _best(model: Model, rows: Rows, experiment: Experiment, tokenizer: Tokenizer) -> Array:
    """Of `sampler.candidates` images of every row, that behind which its text is likeliest, the
    first of equals; [B, h, w, c]. Where no row has a text, one is drawn.

    DALL-E has its samples ranked by another model (Ramesh et al. 2021, arXiv 2102.12092, section
    2.6). Here the model that draws reads as well.
    """
    empty = guidance(model, rows, experiment, tokenizer)

    def drawn(key_B: Array) -> Array:
        return model.draw(rows.context, empty, experiment.sampler, key_B)

    def step(k: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        image_Bhwc = drawn(jax.vmap(jax.random.fold_in, (0, None))(rows.place_key_B, k))
        likelihood_B = text_likelihood(model, rows, image_Bhwc, experiment, tokenizer)
        better_B = (likelihood_B > best[1]) | jnp.isnan(best[1])
        return jax.tree.map(
            lambda new, old: jnp.where(jnp.expand_dims(better_B, range(1, new.ndim)), new, old),
            (image_Bhwc, likelihood_B),
            best,
        )

    candidates = experiment.sampler.candidates
    if candidates == 1:
        return drawn(rows.place_key_B)
    shape = jax.eval_shape(drawn, rows.place_key_B).shape
    none_yet = jnp.zeros(shape), jnp.full(shape[:1], jnp.nan)
    count = jnp.where((text_lengths(rows) > 0).any(), candidates, 1)
    return jax.lax.fori_loop(0, count, step, none_yet)[0]
