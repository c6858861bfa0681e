"""Batch: the one contract between data and model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transfusion_jax.shapes import BL, BM, BMhwc, FloatBL


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B packed rows of L positions with up to M images each.

    A row `<s> two cats BOI p p p p EOI </s> <s> hi </s> pad` is

        segment  1 1 1 1 1 1 1 1 1 1  2 2 2  0     documents 1, 2, ...; 0 is padding
        position 0 1 2 3 4 5 6 7 8 9  0 1 2  0     RoPE positions restart with each document
        target   the next token, weight 0 where there is none to learn: the input is BOI or a patch,
                 the document ends, or the row is padding
    """

    tokens_BL: BL  # patch positions hold 0
    segment_BL: BL
    position_BL: BL
    text_target_BL: BL
    text_weight_BL: FloatBL
    latents_BMhwc: BMhwc
    image_start_BM: BM  # position of the first patch; L marks an empty slot
    image_limit_BM: BM  # timesteps are drawn below this noise limit

    @property
    def image_weight_BM(self) -> jax.Array:
        """1 for an image, 0 for an empty slot."""
        return (self.image_start_BM < self.tokens_BL.shape[1]).astype(jnp.float32)
