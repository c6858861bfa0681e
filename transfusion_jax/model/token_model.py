"""What all families share: tokens in, a transformer on rows or on a cache, logits out."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.config import ModelConfig
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.interface import Context
from transfusion_jax.model.layers import float32_product, parameter
from transfusion_jax.model.losses import TokenLosses, token_losses
from transfusion_jax.model.transformer import KVCache, Transformer
from transfusion_jax.parallel.gathers import gathered, on_rows
from transfusion_jax.shapes import BLD

EMBEDDING_SCALE = 0.02  # as in Llama


def embedding(config: ModelConfig, rows: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """Vectors [V, D] of `rows` tokens."""
    shape = (rows, config.width)
    return parameter(rngs.params(), shape, ("vocab", "embed"), EMBEDDING_SCALE)


def output(config: ModelConfig, rows: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """The projection [D, V] to the logits of `rows` tokens."""
    shape = (config.width, rows)
    return parameter(rngs.params(), shape, ("embed", "vocab"), config.width**-0.5)


class TokenModel(nnx.Module):
    """Abstract: the methods of `Model` that have nothing to do with images.

    A family sets the attributes below. Text tokens are the first `config.vocab_size` rows of the
    embedding.
    """

    config: ModelConfig
    embedding_VD: nnx.Param
    transformer: Transformer
    output_DV: nnx.Param

    def new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache.zeros(self.config, rows, length)

    def extend(self, tokens_BT: Array, context: Context) -> tuple[Array, KVCache]:
        """Runs T tokens after the context, each seeing those before it."""
        position_BT = next_positions(context, tokens_BT.shape[1])
        intervals = Intervals(jnp.zeros_like(position_BT), position_BT + 1)
        return self.transformer.extend(
            self.embed(tokens_BT), position_BT, intervals, context.cache, context.length_B
        )

    def read_vectors(
        self,
        x_BLD: BLD,
        position_BL: Array,
        intervals: Intervals,
        cache: KVCache,
        image_BL: Array | bool = False,
    ) -> tuple[BLD, KVCache]:
        """Runs whole rows into an empty cache; `image_BL` as in `Transformer.extend`."""
        start_B = jnp.zeros(x_BLD.shape[:1], jnp.int32)
        return self.transformer.extend(x_BLD, position_BL, intervals, cache, start_B, image_BL)

    def embed(self, tokens_BL: Array) -> Array:
        # Looked up in float32, in which the gradients of a token's many places are then added.
        def look_up(embedding_VD, tokens_BL):
            return embedding_VD[tokens_BL].astype(self.config.compute_dtype)

        return on_rows(look_up, self.embedding_VD, jnp.float32, tokens_BL)

    def token_losses(
        self, hidden_BLD: BLD, target_BL: Array, weight_BL: Array, chunk: int
    ) -> TokenLosses:
        """As `losses.token_losses`; the kernel is all-gathered once for all chunks."""

        def losses(kernel_DV, *rows):
            return token_losses(*rows, kernel_DV, chunk)

        return on_rows(losses, self.output_DV, jnp.float32, hidden_BLD, target_BL, weight_BL)

    def logits(self, hidden_BLD: Array) -> Array:
        """Logits of the text tokens at every position, in float32."""
        kernel_DV = gathered(self.output_DV, jnp.float32)[:, : self.config.vocab_size]
        return float32_product(hidden_BLD, kernel_DV)


def block_multiplications(blocks: nnx.Module) -> int:
    """Of one position with all of these blocks. Norms multiply nothing."""
    flat = nnx.to_flat_state(nnx.state(blocks, nnx.Param))
    return sum(math.prod(x.shape) for _, x in flat if "norm" not in x.get_metadata("out_sharding"))


def next_positions(context: Context, count: int) -> Array:
    """The next `count` positions of each row, [B, count]."""
    return context.length_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]


def patch_positions(image_start_BM: Array, patches: int) -> Array:
    """Positions [B, Q], Q = M * P, of all patches of a row; those of empty slots lie past its
    end."""
    offset_P = jnp.arange(patches, dtype=jnp.int32)
    at_BMP = image_start_BM[:, :, None] + offset_P[None, None, :]
    return at_BMP.reshape(at_BMP.shape[0], -1)
