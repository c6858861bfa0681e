"""Transfusion: one transformer over text tokens and image patches (arXiv 2408.11039, section 3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, ImageConfig, ModelConfig
from transfusion_jax.model.attention.intervals import row_intervals
from transfusion_jax.model.layers import parameter, product
from transfusion_jax.model.patches.linear import LinearPatches
from transfusion_jax.model.transformer import Transformer
from transfusion_jax.parallel.rules import constrain, gathered
from transfusion_jax.shapes import BLD, BM, BMhwc


class Transfusion(nnx.Module):
    """Token embedding and patch encoder in, transformer, vocabulary projection and patch decoder out."""

    def __init__(self, config: ModelConfig, image: ImageConfig, *, rngs: nnx.Rngs):
        D, V = config.width, config.vocab_size
        self.embedding_VD = parameter(
            rngs.params(), (V, D), ("vocab", "embed"), 0.02
        )  # as in Llama
        self.patches = LinearPatches(config, image, rngs=rngs)
        self.transformer = Transformer(config, rngs=rngs)
        self.output_DV = parameter(rngs.params(), (D, V), ("embed", "vocab"), D**-0.5)
        self.config, self.image = config, image

    def __call__(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> tuple[BLD, BMhwc]:
        """Hidden states for text, and what the diffusion process asks to be predicted for every image slot.

        Logits are `hidden_BLD @ output_DV`; they are left to `objective.py`, which never builds all of them.
        """
        x_BLD = self.embed_batch(batch, noisy_BMhwc, t_BM)
        hidden_BLD = self.transformer(
            x_BLD, batch.position_BL, row_intervals(batch, self.image.patches)
        )
        at_BQ = self._patch_positions(batch)
        hidden_BQD = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))(
            hidden_BLD, at_BQ
        )
        B, M = batch.image_start_BM.shape
        return hidden_BLD, self.patches.decode(hidden_BQD.reshape(B, M, self.image.patches, -1))

    def embed_batch(self, batch: Batch, noisy_BMhwc: BMhwc, t_BM: BM) -> BLD:
        """What enters the transformer: token embeddings, and patch vectors where the images are."""
        at_BQ = self._patch_positions(batch)
        vectors_BQD = self.patches.encode(noisy_BMhwc, t_BM).reshape(*at_BQ.shape, -1)
        x_BLD = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))(
            self.embed(batch.tokens_BL), at_BQ, vectors_BQD
        )
        return constrain(x_BLD, "batch", "residual", None)

    def _patch_positions(self, batch: Batch) -> Array:
        """Positions [B, M * P] of all patches of a row; those of empty slots lie past its end."""
        offset_P = jnp.arange(self.image.patches, dtype=jnp.int32)
        at_BMP = batch.image_start_BM[:, :, None] + offset_P[None, None, :]
        return at_BMP.reshape(at_BMP.shape[0], -1)

    def embed(self, tokens_BL: Array) -> Array:
        # Looked up in float32, in which the gradients of a token's many places are then added.
        return gathered(self.embedding_VD, jnp.float32)[tokens_BL].astype(self.config.compute_dtype)

    def head(self) -> Callable[[Array], Array]:
        """From hidden states to logits in float32; made once, its kernel is gathered once for all calls."""
        kernel_DV = gathered(self.output_DV, jnp.float32)
        return lambda hidden_BLD: product(hidden_BLD, kernel_DV.astype(hidden_BLD.dtype)).astype(
            jnp.float32
        )

    def logits(self, hidden_BLD: Array) -> Array:
        """Logits of every position, in float32."""
        return self.head()(hidden_BLD)


def build(experiment: Experiment, seed: int | Array) -> Transfusion:
    """A freshly initialised model; under `jax.eval_shape` it costs nothing at any size."""
    return Transfusion(experiment.model, experiment.image, rngs=nnx.Rngs(params=seed))


def abstract_model(experiment: Experiment) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of the model, and its parameters as shapes with logical axis names; nothing is allocated.

    (Not `nnx.eval_shape`, which under a mesh would take the logical names for mesh axes.)
    """
    graphs = []

    def parameters():
        graph, state = nnx.split(build(experiment, 0), nnx.Param)
        graphs.append(graph)
        return state

    state = jax.eval_shape(parameters)
    return graphs.pop(), state
