"""The row-interval mask of a packed row."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from transfusion_jax.batch import Batch
from transfusion_jax.shapes import BL


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intervals:
    """Query i sees the keys [k_start_i, k_end_i): none if that is empty."""

    k_start_BL: BL
    k_end_BL: BL


def row_intervals(batch: Batch, patches: int) -> Intervals:
    """Intervals of packed rows: from the start of one's document to oneself, or to the end of one's
    image.

    The recipe: causal everywhere, bidirectional among the patches of one image (section 3.1). For
    the row `<s> BOI p p EOI </s> <s> hi </s> pad` the intervals are

        k_start  0 0 0 0 0 0  6 6 6  0
        k_end    1 2 4 4 5 6  7 8 9  0

    Args:
      patches: of an image that see one another; 1 where attention is causal in images too.
    """
    segment_BL = batch.segment_BL
    B, L = segment_BL.shape
    index_L = jnp.arange(L, dtype=jnp.int32)[None, :]
    previous_BL = jnp.pad(segment_BL[:, :-1], ((0, 0), (1, 0)))
    k_start_BL = jax.lax.cummax(jnp.where(segment_BL != previous_BL, index_L, 0), axis=1)

    patch_BMP = (
        batch.image_start_BM[:, :, None] + jnp.arange(patches, dtype=jnp.int32)[None, None, :]
    )
    end_BMP = jnp.broadcast_to(batch.image_start_BM[:, :, None] + patches, patch_BMP.shape)
    causal_BL = jnp.broadcast_to(index_L + 1, (B, L))
    k_end_BL = jax.vmap(lambda end, at, value: end.at[at].set(value, mode="drop"))(
        causal_BL, patch_BMP, end_BMP
    )

    padding_BL = segment_BL == 0
    return Intervals(jnp.where(padding_BL, 0, k_start_BL), jnp.where(padding_BL, 0, k_end_BL))
