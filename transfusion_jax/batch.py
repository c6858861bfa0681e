"""Batch: the one contract between data and model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transfusion_jax.shapes import BL, BM, BMhwc, FloatBL


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B packed rows of L positions with up to M images each.

    A row `<s> two cats BOI p p p p EOI </s> <s> hi </s> pad` has

        segment  1 1 1 1 1 1 1 1 1 1  2 2 2  0
        position 0 1 2 3 4 5 6 7 8 9  0 1 2  0
    """

    tokens_BL: BL
    """Token ids; 0 at patches and padding."""
    segment_BL: BL
    """Number of the document in its row: 1, 2, ...; 0 is padding."""
    position_BL: BL
    """Position for RoPE, restarting with each document."""
    text_target_BL: BL
    """The next token."""
    text_weight_BL: FloatBL
    """Weight of the text loss: 0 where there is no next token to learn, because the input is BOI or
    a patch, the document ends, or the row is padding."""
    latents_BMhwc: BMhwc
    """Clean images."""
    image_start_BM: BM
    """Position of the first patch; L marks an empty slot."""
    image_limit_BM: BM
    """Noise limit: timesteps are drawn below it."""

    @property
    def image_weight_BM(self) -> jax.Array:
        """1 for an image, 0 for an empty slot."""
        return (self.image_start_BM < self.tokens_BL.shape[1]).astype(jnp.float32)
