"""The transformer, and the image grid that it sees."""

from dataclasses import dataclass
from typing import Literal

from transfusion_jax.errors import require


@dataclass(frozen=True)
class ImageConfig:
    """The image grid that the transformer sees: pixels, or the latents of an autoencoder."""

    height: int = 32
    """h: rows of the grid, a multiple of `patch`."""
    width: int = 32
    """w: columns of the grid, a multiple of `patch`."""
    channels: int = 8
    """c: values at each place of the grid."""
    patch: int = 2
    """Side of a square patch, in latent pixels (k in the paper's section 4.3)."""

    def __post_init__(self):
        require(
            min(self.height, self.width, self.channels, self.patch) > 0,
            f"image sizes must be positive: {self}",
        )
        require(
            self.height % self.patch == 0 and self.width % self.patch == 0,
            f"image.patch={self.patch} must divide image.height={self.height} "
            f"and image.width={self.width}",
        )

    @property
    def patches(self) -> int:
        """P: patches of one image."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def patch_values(self) -> int:
        """Z: values of one patch."""
        return self.patch * self.patch * self.channels

    @property
    def span(self) -> int:
        """Positions that one image takes in a row: BOI, its patches, EOI."""
        return self.patches + 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style transformer: pre-RMSNorm, RoPE, SwiGLU, no biases, untied embeddings."""

    layers: int = 16
    """Transformer layers."""
    width: int = 768
    """D: width of the residual stream."""
    heads: int = 12
    """N: attention heads; they divide the width."""
    kv_heads: int = 0
    """Key and value heads; 0 means as many as `heads`."""
    mlp_width: int = 0
    """Feed-forward width; 0 means Llama's: 2/3 of 4 widths, rounded up to a multiple of 256."""
    vocab_size: int = 32_128
    """Embedding rows: the tokenizer's entries and the special tokens, rounded up to a number that
    the mesh divides."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Parameters, softmax, norms and losses are float32 whatever this says."""
    timestep: Literal["before", "after"] = "before"
    """Where the timestep embedding is added: to the patch vector before the linear layer (the
    paper), or to the layer's output, where it cannot be mistaken for the content of a small
    patch."""
    patch_position: Literal["rope", "learned"] = "rope"
    """How a patch knows its place in the image: by RoPE alone, as text does, or by a learned
    vector as well (our choice; the paper is silent). With the vector, small models learn to read
    images sooner (docs/design.md, log)."""
    remat: Literal["none", "minimal", "attention", "full", "offload"] = "full"
    """What the backward pass recomputes: nothing; all but the products with parameters; all but
    attention (`chunked` and `pallas` only); or every layer from its input, which `offload` keeps
    in the memory of an accelerator's host."""
    attention: Literal["auto", "chunked", "dense", "pallas", "tokamax"] = "auto"
    """`pallas` runs on TPU, `tokamax` on GPU (`pip install 'transfusion-jax[gpu]'`), the others
    anywhere; `dense` builds the full matrix of scores. `auto` is `pallas` on TPU, `tokamax` on
    GPU if it is installed, else `chunked`."""
    attention_block: int = 0
    """Positions in a block of `chunked` or `pallas`; 0 means 128 and 512. `pallas` takes
    multiples of 128 only; where `auto` chooses `pallas` and this is not one, `pallas` uses its
    default."""

    def __post_init__(self):
        require(
            min(self.layers, self.width, self.heads, self.vocab_size) > 0,
            f"model sizes must be positive: {self}",
        )
        require(
            self.width % self.heads == 0,
            f"model.heads={self.heads} must divide model.width={self.width}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.width / model.heads = {self.head_dim} must be even (RoPE)",
        )
        require(
            self.kv_heads >= 0 and self.heads % self.num_kv_heads == 0,
            f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}",
        )
        require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta} must be positive")
        require(
            self.norm_epsilon >= 0,
            f"model.norm_epsilon={self.norm_epsilon} must not be negative",
        )
        require(self.mlp_width >= 0, f"model.mlp_width={self.mlp_width} must not be negative")
        require(
            self.attention_block >= 0,
            f"model.attention_block={self.attention_block} must not be negative",
        )
        require(
            self.attention != "pallas" or self.attention_block % 128 == 0,
            f"model.attention_block={self.attention_block} must be a multiple of 128 for "
            "model.attention='pallas'",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        return self.mlp_width or -(-8 * self.width // 3 // 256) * 256
