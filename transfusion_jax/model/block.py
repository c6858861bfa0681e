"""One layer of the transformer: Llama's block, over a packed row or over a cache."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.config import ModelConfig
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.layers import LayerNorm, RMSNorm, SwiGLU, parameter, project
from transfusion_jax.model.rope import rotate


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
        v_BSKH = project(x_BLD, self.v_DKH)
        out_BLNH, cache = attend(self.config, q_BLNH, k_BSKH, v_BSKH, cos_sin, intervals, cache)
        return project(out_BLNH, self.out_NHD, contracted=2), cache


def attend(
    config: ModelConfig,
    q_BLNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    cos_sin: tuple[Array, Array],
    intervals: Intervals,
    cache: tuple[KVCache, Array] | None = None,
) -> tuple[Array, KVCache | None]:
    """Rotates queries and keys and attends, with a cache to that and the entries that are new."""
    q_BLNH, k_BSKH = rotate(q_BLNH, *cos_sin), rotate(k_BSKH, *cos_sin)
    if cache is not None:
        kv, start_B = cache
        k_BSKH, v_BSKH = _write(kv.k, k_BSKH, start_B), _write(kv.v, v_BSKH, start_B)
        cache = KVCache(k_BSKH, v_BSKH)
    out_BLNH = attention(
        q_BLNH, k_BSKH, v_BSKH, intervals,
        implementation="dense" if q_BLNH.shape[1] == 1 else config.attention,
        block=config.attention_block,
    )  # fmt: skip
    return out_BLNH, cache


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
