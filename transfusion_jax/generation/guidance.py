"""Classifier-free guidance: an image is drawn away from what the model would draw without a
prompt."""

import jax.numpy as jnp

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.generation.rows import Rows, feed
from transfusion_jax.model.interface import Guidance, Model


def guidance(
    model: Model, rows: Rows, experiment: Experiment, tokenizer: Tokenizer
) -> Guidance | None:
    """Contrasts every row with an image that nothing comes before, `<s> BOI`, as caption dropout
    trains it; None at `sampler.guidance` 1, which is no guidance."""
    weight = experiment.sampler.guidance
    if weight == 1:
        return None
    count = len(rows.length_B)
    empty = rows._replace(
        cache=model.new_cache(count, 2 + experiment.image.patches),
        length_B=jnp.zeros_like(rows.length_B),
    )
    for token in (tokenizer.bos, tokenizer.boi):
        token_B = jnp.full((count,), token, jnp.int32)
        empty = feed(model, empty, token_B, advance_B=jnp.ones((count,), bool))
    return Guidance(empty.context, weight)
