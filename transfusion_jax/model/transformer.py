"""The transformer: Llama blocks, stacked and scanned, over a packed row or over a cache."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from transfusion_jax.config import ModelConfig
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import KEPT
from transfusion_jax.model.block import Block, KVCache
from transfusion_jax.model.grouped import PRODUCT, chosen, grouped, selected
from transfusion_jax.model.layers import RMSNorm
from transfusion_jax.model.mixture_of_transformers import mixture_block
from transfusion_jax.model.rope import rotation
from transfusion_jax.parallel.rules import constrain
from transfusion_jax.shapes import BL, BLD

LAYER_INPUT = "layer_input"
# What a layer keeps for its backward pass (`model.remat`); all else is computed again.
POLICIES = {
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT, KEPT),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


class Transformer(nnx.Module):
    """All blocks, with their parameters stacked along a leading `layers` axis, and the final
    norm; with `model.experts="modality"` all of it twice, once for images."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = blocks(rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.mixture = config.experts == "modality"
        if self.mixture:
            self.image_blocks = blocks(rngs)
            self.image_norm = RMSNorm(config.width, config.norm_epsilon)
        self.config = config

    def __call__(
        self, x_BLD: BLD, position_BL: BL, intervals: Intervals, image_BL: Array | None = None
    ) -> BLD:
        """Packed rows in, normed hidden states out.

        Args:
          image_BL: which positions are patches; a mixture needs it.
        """
        merged, stacked = self._split()
        cos_sin = self._rotation(position_BL)

        def layer(x_BLD, parameters):
            x_BLD = checkpoint_name(x_BLD, LAYER_INPUT)
            blocks = merged(parameters)
            if self.mixture:
                x_BLD, _ = mixture_block(*blocks, x_BLD, cos_sin, intervals, image_BL, grouped)
            else:
                x_BLD, _ = blocks[0](x_BLD, cos_sin, intervals)
            return constrain(x_BLD, "batch", "residual", None), None

        unroll = self.config.layer_loop == "unroll"
        if self.config.remat != "none":
            # In a loop, what is recomputed cannot be merged with what was computed before.
            # Written out it can, and the little that `minimal` recomputes may be.
            layer = jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[self.config.remat])
        x_BLD, _ = jax.lax.scan(layer, x_BLD, stacked, unroll=unroll)
        return self._normed(x_BLD, image_BL)

    def extend(
        self,
        x_BTD: Array,
        position_BT: Array,
        intervals: Intervals,
        cache: KVCache,
        start_B: Array,
        image_BT: Array | bool = False,
    ) -> tuple[Array, KVCache]:
        """Runs T new positions of each row, which take the cache entries [start, start + T).

        Entries that are there already are overwritten: so an image is denoised in place. The
        intervals are in cache positions.

        Args:
          image_BT: which positions are patches, if they differ; else whether all are.
        """
        merged, stacked = self._split()
        cos_sin = self._rotation(position_BT)

        def layer(x_BTD, per_layer):
            parameters, kv = per_layer
            blocks, cached = merged(parameters), (kv, start_B)
            if isinstance(image_BT, bool) or not self.mixture:
                block = blocks[self.mixture and image_BT]
                return block(x_BTD, cos_sin, intervals, cached)
            return mixture_block(*blocks, x_BTD, cos_sin, intervals, image_BT, selected, cached)

        x_BTD, cache = jax.lax.scan(layer, x_BTD, (stacked, cache))
        return self._normed(x_BTD, image_BT), cache

    def _rotation(self, position_BL: BL) -> tuple[Array, Array]:
        config = self.config
        return rotation(position_BL, config.head_dim, config.rope_theta, config.rope_scaling)

    def _split(self) -> tuple[Callable[..., tuple[Block, ...]], tuple[nnx.State, ...]]:
        """What makes the blocks of a layer from its parameters, and those of all layers, stacked.

        The first block is that of text, or of all positions; the second, if any, that of images.
        """
        stacks = (self.blocks, self.image_blocks) if self.mixture else (self.blocks,)
        graphs, parameters = zip(*map(nnx.split, stacks), strict=True)
        return lambda layer: tuple(map(nnx.merge, graphs, layer)), parameters

    def _normed(self, x_BLD: Array, image_BL: Array | bool | None) -> Array:
        if not self.mixture:
            return self.norm(x_BLD)
        if isinstance(image_BL, bool):
            return (self.image_norm if image_BL else self.norm)(x_BLD)
        return chosen(image_BL, self.image_norm(x_BLD), self.norm(x_BLD))
