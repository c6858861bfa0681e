"""What training, generation and planning ask of a model: the one interface of all families.

A family is a class of NNX modules with the methods of `Model`; `build.py` chooses it. Nothing else
may depend on which family a model is of.

| who | uses |
|---|---|
| the objective | `losses`, `weights`, `coefficients` |
| the engine | `new_cache`, `read`, `extend`, `logits`, `draw`, `show` |
| planning | `multiplications` |
| state, checkpoints, loading | `build.abstract_model`, `build.build` |
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jax import Array

from transfusion_jax.batch import Batch
from transfusion_jax.config import SamplerConfig, TrainConfig
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.transformer import KVCache
from transfusion_jax.shapes import BLD, BM


class Context(NamedTuple):
    """What each row of a batch has in a cache: its first `length` entries."""

    cache: KVCache
    length_B: Array
    hidden_BD: Array
    """The hidden state of the last of them."""


class Guidance(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) away from an image of
    anything."""

    empty: Context
    """`<s> BOI`: nothing comes before the image."""
    weight: float

    def combine(self, given: Array, empty: Array) -> Array:
        """Of outputs for the row's own context and for the empty one."""
        return empty + self.weight * (given - empty)


@runtime_checkable
class Model(Protocol):
    """A model of rows of text and images."""

    # Training

    def losses(self, batch: Batch, noise: Noise, vocab_chunk: int) -> dict[str, Array]:
        """Losses of single examples, by name: "text" and "image", which are reported, and any
        others.

        Args:
          noise: timesteps and noise of the image slots, for families that diffuse images.
            (Others are given them too, and leave them.)
          vocab_chunk: positions of a row whose logits may exist at one time.
        """

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of every example in the mean of its name; each has the shape of its losses."""

    def coefficients(self, train: TrainConfig) -> dict[str, float]:
        """By name, what the mean is multiplied with in the total that is minimised. Names that are
        left out are only reported."""

    # Generation

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache of `length` positions."""

    def read(self, batch: Batch, t_BM: BM, cache: KVCache) -> tuple[BLD, KVCache]:
        """Hidden states of rows that start at position 0 of an empty cache, images at timestep
        t."""

    def extend(self, tokens_BT: Array, context: Context) -> tuple[Array, KVCache]:
        """Hidden states [B, T, D] of T more tokens of each row, and the cache that holds them
        too."""

    def logits(self, hidden_BLD: Array) -> Array:
        """Of the next text token, [B, L, V], in float32."""

    def draw(
        self, context: Context, guidance: Guidance | None, sampling: SamplerConfig, key_B: Array
    ) -> Array:
        """An image [B, h, w, c] for every row, whose context ends in BOI.

        Row b's random numbers depend on `key_B[b]` alone.
        """

    def show(self, image_Bhwc: Array, context: Context, timestep: int) -> KVCache:
        """The cache with a finished image of every row in the P positions after its context, which
        ends in BOI, seen at a timestep by what follows."""

    # Planning

    def multiplications(self) -> dict[str, int]:
        """Weights that the forward pass multiplies with each "position" of a row, each "target" (a
        position whose logits the loss needs), each "patch" and each "image"; shapes suffice."""
