"""Drawing: rows after BOI draw one image each."""

import jax.numpy as jnp
from jax import Array

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.guidance import guidance
from transfusion_jax.generation.rows import IMAGE, TEXT, Rows, feed
from transfusion_jax.model.interface import Model


def draw_images(
    model: Model, rows: Rows, *, experiment: Experiment, tokenizer: Tokenizer
) -> tuple[Rows, Array]:
    """Rows in IMAGE draw one, add EOI, which is never predicted, and are back in TEXT.

    Returns:
      The rows, and an image [B, h, w, c] for each; those of rows in other states mean nothing.
    """
    drawing_B = rows.status_B == IMAGE
    image_Bhwc, cache = model.draw(
        rows.context,
        guidance(model, rows, experiment, tokenizer),
        experiment.sampler,
        rows.place_key_B,
    )
    added_B = jnp.where(drawing_B, experiment.image.patches, 0)
    rows = rows._replace(cache=cache, length_B=rows.length_B + added_B)
    eoi_B = jnp.full_like(rows.length_B, tokenizer.eoi)
    rows = feed(model, rows, eoi_B, advance_B=drawing_B)
    return rows._replace(status_B=jnp.where(drawing_B, TEXT, rows.status_B)), image_Bhwc
