"""The transformer: Llama blocks, stacked and scanned, over a packed row or over a cache."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from transfusion_jax.config import ModelConfig
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.remat import KEPT
from transfusion_jax.model.layers import LayerNorm, RMSNorm, SwiGLU, parameter, project
from transfusion_jax.model.rope import rotate, rotation
from transfusion_jax.parallel.rules import constrain
from transfusion_jax.shapes import BL, BLD

LAYER_INPUT = "layer_input"
# What a layer keeps for its backward pass (`model.remat`); all else is computed again.
POLICIES = {
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of S positions, one slice per layer: [layers, B, S, K, H]."""

    k: Array
    v: Array

    @staticmethod
    def zeros(config: ModelConfig, batch: int, length: int) -> "KVCache":
        shape = (config.layers, batch, length, config.num_kv_heads, config.head_dim)
        return KVCache(
            jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype)
        )


def _write(cache_BSKH: Array, new_BTKH: Array, start_B: Array) -> Array:
    """Puts T new entries at each row's own start; positions past the end of the cache are
    dropped."""
    at_BT = start_B[:, None] + jnp.arange(new_BTKH.shape[1])[None, :]
    return jax.vmap(lambda cache, at, new: cache.at[at].set(new, mode="drop"))(
        cache_BSKH, at_BT, new_BTKH
    )


class Attention(nnx.Module):
    """Projections around interval attention, with RoPE, and a norm if asked for, on queries and
    keys."""

    def __init__(self, config: ModelConfig, out_gain: float, *, rngs: nnx.Rngs):
        D, N, K, H = config.width, config.heads, config.num_kv_heads, config.head_dim
        self.q_DNH = parameter(rngs.params(), (D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
        self.k_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.v_DKH = parameter(rngs.params(), (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.out_NHD = parameter(
            rngs.params(), (N, H, D), ("heads", "head_dim", "embed"), out_gain * D**-0.5
        )
        if config.qk_norm:
            self.q_norm = LayerNorm(H, config.norm_epsilon)
            self.k_norm = LayerNorm(H, config.norm_epsilon)
        self.config = config

    def __call__(
        self,
        x_BLD: Array,
        cos_sin: tuple[Array, Array],
        intervals: Intervals,
        cache: tuple[KVCache, Array] | None = None,
    ) -> tuple[Array, KVCache | None]:
        q_BLNH, k_BSKH = project(x_BLD, self.q_DNH), project(x_BLD, self.k_DKH)
        if self.config.qk_norm:
            q_BLNH, k_BSKH = self.q_norm(q_BLNH), self.k_norm(k_BSKH)
        q_BLNH, k_BSKH = rotate(q_BLNH, *cos_sin), rotate(k_BSKH, *cos_sin)
        v_BSKH = project(x_BLD, self.v_DKH)
        if cache is not None:
            kv, start_B = cache
            k_BSKH, v_BSKH = _write(kv.k, k_BSKH, start_B), _write(kv.v, v_BSKH, start_B)
            cache = KVCache(k_BSKH, v_BSKH)
        out_BLNH = attention(
            q_BLNH, k_BSKH, v_BSKH, intervals,
            implementation="dense" if x_BLD.shape[1] == 1 else self.config.attention,
            block=self.config.attention_block,
        )  # fmt: skip
        return project(out_BLNH, self.out_NHD, contracted=2), cache


class Block(nnx.Module):
    """Pre-norm: h = x + attention(norm(x)); h + mlp(norm(h)). Post-norm: h = x +
    norm(attention(x)); h + norm(mlp(h))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        # Residual branches start small, so that the depth does not set the scale of the output
        # (GPT-2).
        out_gain = (2 * config.layers) ** -0.5
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, out_gain, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = SwiGLU(config.width, config.ffn_width, out_gain, rngs=rngs)
        self.pre = config.norm_placement == "pre"

    def __call__(self, x_BLD, cos_sin, intervals, cache=None):
        with jax.named_scope("block"):
            with jax.named_scope("attention"):
                in_BLD = self.attention_norm(x_BLD) if self.pre else x_BLD
                out_BLD, cache = self.attention(in_BLD, cos_sin, intervals, cache)
                x_BLD = x_BLD + (out_BLD if self.pre else self.attention_norm(out_BLD))
            with jax.named_scope("mlp"):
                if self.pre:
                    return x_BLD + self.mlp(self.mlp_norm(x_BLD)), cache
                return x_BLD + self.mlp_norm(self.mlp(x_BLD)), cache


class Transformer(nnx.Module):
    """All blocks, with their parameters stacked along a leading `layers` axis, and the final
    norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = blocks(rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.config = config

    def __call__(self, x_BLD: BLD, position_BL: BL, intervals: Intervals) -> BLD:
        """Packed rows in, normed hidden states out."""
        graph, parameters = nnx.split(self.blocks)
        cos_sin = self._rotation(position_BL)

        def layer(x_BLD, parameters):
            x_BLD = checkpoint_name(x_BLD, LAYER_INPUT)
            x_BLD, _ = nnx.merge(graph, parameters)(x_BLD, cos_sin, intervals)
            return constrain(x_BLD, "batch", "residual", None), None

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=POLICIES[self.config.remat])
        x_BLD, _ = jax.lax.scan(layer, x_BLD, parameters)
        return self.norm(x_BLD)

    def extend(
        self, x_BTD: Array, position_BT: Array, intervals: Intervals, cache: KVCache, start_B: Array
    ) -> tuple[Array, KVCache]:
        """Runs T new positions of each row, which take the cache entries [start, start + T).

        Entries that are there already are overwritten: so an image is denoised in place. The
        intervals are in cache positions.
        """
        graph, parameters = nnx.split(self.blocks)
        cos_sin = self._rotation(position_BT)

        def layer(x_BTD, per_layer):
            parameters, kv = per_layer
            return nnx.merge(graph, parameters)(x_BTD, cos_sin, intervals, (kv, start_B))

        x_BTD, cache = jax.lax.scan(layer, x_BTD, (parameters, cache))
        return self.norm(x_BTD), cache

    def _rotation(self, position_BL: BL) -> tuple[Array, Array]:
        config = self.config
        return rotation(position_BL, config.head_dim, config.rope_theta, config.rope_scaling)
