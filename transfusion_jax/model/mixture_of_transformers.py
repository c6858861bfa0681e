"""Mixture-of-Transformers: text and images have weights of their own, and attention is over both
(Liang et al. 2024, arXiv 2411.04996, algorithm 1).

Every position multiplies the kernels, and is normed with the scales, of its modality. Positions of
images are patches; BOI and EOI are text. With the weights of text frozen it is LMFusion (Shi et al.
2024, arXiv 2412.15188).
"""

from collections.abc import Callable

import jax
from flax import nnx
from jax import Array

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.block import Block, KVCache, attend
from transfusion_jax.model.grouped import Pair, Work, chosen

Compute = Callable[[Work, Array, Array], tuple[Array, ...]]
"""`grouped` or `selected`: from work, positions and their modality to its results."""


def mixture_block(
    text: Block,
    image: Block,
    x_BLD: Array,
    cos_sin: tuple[Array, Array],
    intervals: Intervals,
    image_BL: Array,
    compute: Compute,
    cache: tuple[KVCache, Array] | None = None,
) -> tuple[Array, KVCache | None]:
    """What `Block` does, with the weights of two: as `text(x)` where `image_BL` is False, and as
    `image(x)` where it is True, but for attention, which is over all."""

    def norm(of: Callable[[Block], nnx.Module], x: Array) -> Array:
        return chosen(image_BL, of(image)(x), of(text)(x))

    def pair(of: Callable[[Block], nnx.Param]) -> Pair:
        return Pair(of(text), of(image))

    config, pre = text.attention.config, text.pre
    with jax.named_scope("block"):
        with jax.named_scope("attention"):
            in_BLD = norm(lambda b: b.attention_norm, x_BLD) if pre else x_BLD
            q_BLNH, k_BSKH, v_BSKH = compute(
                Work(
                    lambda x, q, k, v: (q(x), k(x), v(x)),
                    (
                        pair(lambda b: b.attention.q_DNH),
                        pair(lambda b: b.attention.k_DKH),
                        pair(lambda b: b.attention.v_DKH),
                    ),
                    takes=(None,),
                    gives=(("heads", None), ("kv_heads", None), ("kv_heads", None)),
                ),
                in_BLD,
                image_BL,
            )
            if config.qk_norm:
                q_BLNH = norm(lambda b: b.attention.q_norm, q_BLNH)
                k_BSKH = norm(lambda b: b.attention.k_norm, k_BSKH)
            out_BLNH, cache = attend(config, q_BLNH, k_BSKH, v_BSKH, cos_sin, intervals, cache)
            (out_BLD,) = compute(
                Work(
                    lambda x, out: (out(x, contracted=2),),
                    (pair(lambda b: b.attention.out_NHD),),
                    takes=("heads", None),
                    gives=((None,),),
                    summed="heads",
                ),
                out_BLNH,
                image_BL,
            )
            x_BLD = x_BLD + (out_BLD if pre else norm(lambda b: b.attention_norm, out_BLD))
        with jax.named_scope("mlp"):
            in_BLD = norm(lambda b: b.mlp_norm, x_BLD) if pre else x_BLD
            (out_BLD,) = compute(
                Work(
                    lambda x, gate, up, down: (down(jax.nn.silu(gate(x)) * up(x)),),
                    (
                        pair(lambda b: b.mlp.gate_DF),
                        pair(lambda b: b.mlp.up_DF),
                        pair(lambda b: b.mlp.down_FD),
                    ),
                    takes=(None,),
                    gives=((None,),),
                    summed="mlp",
                ),
                in_BLD,
                image_BL,
            )
            return x_BLD + (out_BLD if pre else norm(lambda b: b.mlp_norm, out_BLD)), cache
