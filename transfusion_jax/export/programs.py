"""A model's phases as functions of arrays alone, of any number of rows: what `stablehlo` exports.

Prompts are of any multiple of a block of attention, caches of any length from a block on, and rows
hold any number of images; so one artefact serves all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, export

from transfusion_jax.autoencoder.codec import Codec
from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, ModelConfig
from transfusion_jax.diffusion.process import process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.model.attention.platforms import DEFAULT_BLOCK
from transfusion_jax.model.interface import Context
from transfusion_jax.model.transformer import KVCache

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class Program:
    function: Callable[..., Any]
    """Where it takes weights, its first argument is a dict of them, by dotted name."""
    arguments: tuple[Any, ...]
    """Shapes and dtypes; some dimensions are symbolic."""

    def exported(self) -> export.Exported:
        """Lowered for all platforms at once."""
        return export.export(jax.jit(self.function), platforms=PLATFORMS)(*self.arguments)


def portable(experiment: Experiment) -> Experiment:
    """With the attention that runs anywhere, in blocks as in training."""
    model = experiment.model
    block = model.attention_block or DEFAULT_BLOCK["chunked"]
    model = replace(model, attention="chunked", attention_block=block, remat="none")
    return replace(experiment, model=model)


def programs(
    experiment: Experiment, graph: nnx.GraphDef, weights: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Program]:
    """`prefill`, `decode` and, where images are diffused, `denoise` and `step`; `runner.py` says
    what they take and give.

    Args:
      experiment: a portable one, whose model has this graph.
    """
    model, image, block = experiment.model, experiment.image, experiment.model.attention_block

    def model_of(weights: Mapping[str, Array]) -> Any:
        paths = {tuple(map(_key, name.split("."))): x for name, x in weights.items()}
        return nnx.merge(graph, nnx.to_pure_dict(nnx.from_flat_state(paths)))

    def logits_of(net: Any, hidden_B1D: Array) -> Array:
        """Of text, and of the codes after it where images are codes."""
        text_BV = net.logits(hidden_B1D)[:, 0]
        if model.images != "codes":
            return text_BV
        return jnp.concatenate([text_BV, net.code_logits(hidden_B1D)[:, 0]], axis=1)

    def prefill(weights, tokens_BL, length_B, *images_and_cache):
        *images, k, v = images_and_cache
        net = model_of(weights)
        batch, timestep = _prompts(tokens_BL, length_B, images, experiment)
        t_BM = jnp.broadcast_to(timestep, batch.image_start_BM.shape)
        hidden_BLD, cache = net.read(batch, t_BM, KVCache(k, v))
        last_B1D = jnp.take_along_axis(hidden_BLD, (length_B - 1)[:, None, None], axis=1)
        return logits_of(net, last_B1D), cache.k, cache.v

    def decode(weights, token_B, length_B, k, v):
        net = model_of(weights)
        context = Context(KVCache(k, v), length_B, None)
        hidden_B1D, cache = net.extend(token_B[:, None], context)
        return logits_of(net, hidden_B1D), cache.k, cache.v

    def denoise(weights, image_Bhwc, t, length_B, k, v):
        context = Context(KVCache(k, v), length_B, None)
        predicted_Bhwc, cache = model_of(weights).denoise(image_Bhwc, t, context)
        return predicted_Bhwc, cache.k, cache.v

    weights, one = dict(weights), jax.ShapeDtypeStruct((), jnp.int32)
    B, blocks, S, M = _sizes("B", "blocks", "S", "M", least=block)
    prompt = (_int32(B, blocks * block), _int32(B))
    shown = (_float32(B, M, *image.shape), _int32(B, M), one)
    diffused = model.images == "latents"
    found = {
        "prefill": Program(prefill, (weights, *prompt, *shown * diffused, *_cache(model, B, S)))
    }
    B, S = _sizes("B", "S", least=block)
    rows = (_int32(B), *_cache(model, B, S))
    found["decode"] = Program(decode, (weights, _int32(B), *rows))
    if diffused:
        found["denoise"] = Program(denoise, (weights, _float32(B, *image.shape), one, *rows))
        (B,) = _sizes("B")
        noisy = _float32(B, *image.shape)
        step = sampler(experiment.sampler, process(experiment.diffusion)).step
        found["step"] = Program(step, (noisy, noisy, one, one, noisy))
    return found


def picture(codec: Codec, experiment: Experiment) -> tuple[Program, dict[str, Array]]:
    """From latents or codes to pictures in [-1, 1], and the autoencoder's weights for it."""
    weights = {
        ".".join(str(key.key) for key in path): x
        for path, x in jax.tree.flatten_with_path(codec.parameters)[0]
    }

    def picture(weights, image_Bhwc):
        paths = {tuple(map(_key, name.split("."))): x for name, x in weights.items()}
        net = nnx.merge(codec.graph, nnx.to_pure_dict(nnx.from_flat_state(paths)))
        if codec.config.kind == "vq":
            latents = net.quantizer.lookup(image_Bhwc[..., 0].astype(jnp.int32))
        else:
            latents = image_Bhwc / codec.scale + codec.shift
        with jax.default_matmul_precision("float32"):
            return jnp.clip(net.decode(latents), -1.0, 1.0)

    (B,) = _sizes("B")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return Program(picture, (shapes, _float32(B, *experiment.image.shape))), weights


def _prompts(
    tokens_BL: Array, length_B: Array, images: list[Array], experiment: Experiment
) -> tuple[Batch, Array]:
    """One document in each row, and the timestep of its images; an image of zeros, outside the
    row, where the model takes none."""
    if not images:
        empty_B1 = jnp.full_like(length_B, tokens_BL.shape[1])[:, None]
        nothing = jnp.zeros((*empty_B1.shape, *experiment.image.shape))
        images = [nothing, empty_B1, jnp.int32(0)]
    image_BMhwc, start_BM, timestep = images
    index_1L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]
    segment_BL = (index_1L < length_B[:, None]).astype(jnp.int32)
    batch = Batch(
        tokens_BL=tokens_BL,
        segment_BL=segment_BL,
        position_BL=index_1L * segment_BL,
        text_target_BL=tokens_BL,
        text_weight_BL=segment_BL.astype(jnp.float32),
        latents_BMhwc=image_BMhwc,
        image_start_BM=start_BM,
        image_limit_BM=jnp.ones_like(start_BM),
    )
    return batch, timestep


def _sizes(*names: str, least: int = 1) -> tuple[Any, ...]:
    """Symbolic dimensions; S, the length of a cache, is at least `least`."""
    constraints = [f"S >= {least}"] if "S" in names else []
    return export.symbolic_shape(", ".join(names), constraints=constraints)


def _cache(model: ModelConfig, B: Any, S: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = (model.layers, B, S, model.num_kv_heads, model.head_dim)
    return (jax.ShapeDtypeStruct(shape, jnp.dtype(model.compute_dtype)),) * 2


def _int32(*shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _float32(*shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
