"""Mixture-of-Transformers: text and images have weights of their own, and attention is over both
(Liang et al. 2024, arXiv 2411.04996, algorithm 1).

Every position multiplies the kernels, and is normed with the scales, of its modality. Positions of
images are patches; BOI and EOI are text. With the weights of text frozen it is LMFusion (Shi et al.
2024, arXiv 2412.15188).
"""

from collections.abc import Callable
from operator import attrgetter

import jax
from jax import Array

from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.block import Block, KVCache, attend
from transfusion_jax.model.grouped import Pair, Positionwise, chosen

Compute = Callable[[Positionwise, Array, Array], tuple[Array, ...]]
"""`grouped` or `selected`: from a layer, positions and which of them are patches, to results."""


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
    """What `Block` does, with the weights of two: as `text` where `image_BL` is False, and as
    `image` where it is True, but for attention, which is over all."""

    def norm(name: str, x: Array) -> Array:
        own = attrgetter(name)
        return chosen(image_BL, own(image)(x), own(text)(x))

    config, pre = text.attention.config, text.pre
    with jax.named_scope("block"):
        with jax.named_scope("attention"):
            in_BLD = norm("attention_norm", x_BLD) if pre else x_BLD
            q_BLNH, k_BSKH, v_BSKH = compute(_heads(text, image), in_BLD, image_BL)
            if config.qk_norm:
                q_BLNH = norm("attention.q_norm", q_BLNH)
                k_BSKH = norm("attention.k_norm", k_BSKH)
            out_BLNH, cache = attend(config, q_BLNH, k_BSKH, v_BSKH, cos_sin, intervals, cache)
            (out_BLD,) = compute(_output(text, image), out_BLNH, image_BL)
            x_BLD = x_BLD + (out_BLD if pre else norm("attention_norm", out_BLD))
        with jax.named_scope("mlp"):
            in_BLD = norm("mlp_norm", x_BLD) if pre else x_BLD
            (out_BLD,) = compute(_feed_forward(text, image), in_BLD, image_BL)
            return x_BLD + (out_BLD if pre else norm("mlp_norm", out_BLD)), cache


def _heads(text: Block, image: Block) -> Positionwise:
    """Queries, keys and values of normed positions."""
    return Positionwise(
        lambda x, q, k, v: (q(x), k(x), v(x)),
        _pairs(text, image, "attention.q_DNH", "attention.k_DKH", "attention.v_DKH"),
        takes=(None,),
        gives=(("heads", None), ("kv_heads", None), ("kv_heads", None)),
    )


def _output(text: Block, image: Block) -> Positionwise:
    """What attention adds, from its heads."""
    return Positionwise(
        lambda x, out: (out(x, contracted=2),),
        _pairs(text, image, "attention.out_NHD"),
        takes=("heads", None),
        gives=((None,),),
        summed="heads",
    )


def _feed_forward(text: Block, image: Block) -> Positionwise:
    """As `SwiGLU`."""
    return Positionwise(
        lambda x, gate, up, down: (down(jax.nn.silu(gate(x)) * up(x)),),
        _pairs(text, image, "mlp.gate_DF", "mlp.up_DF", "mlp.down_FD"),
        takes=(None,),
        gives=((None,),),
        summed="mlp",
    )


def _pairs(text: Block, image: Block, *names: str) -> tuple[Pair, ...]:
    return tuple(Pair(own(text), own(image)) for own in map(attrgetter, names))
