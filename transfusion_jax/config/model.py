"""The transformer, and the image grid that it sees."""

from dataclasses import dataclass
from typing import Literal

from transfusion_jax.errors import require

UNET_WIDTHS = {2: (768, 1280), 4: (768, 768, 1024), 8: (512, 512, 768, 1024)}
"""By the side of a patch: channels at each resolution that make a U-Net of about 0.27 B parameters
(Table 7; the paper does not say which, so our choice)."""


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
    codes: int = 0
    """Codes of the VQ autoencoder whose indices, one at each place of the grid, are the images of a
    Chameleon; 0: images are pixels or latents."""

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
        require(self.codes >= 0, f"image.codes={self.codes} must not be negative")
        require(
            self.codes == 0 or self.channels == self.patch == 1,
            f"image.codes={self.codes} are one index at each place of the grid: image.channels="
            f"{self.channels} and image.patch={self.patch} must be 1",
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
class RopeScaling:
    """Rotary frequencies of a Llama that was made to read longer rows than it was trained on."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear`: all frequencies are divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    `llama3`: those that turn fewer than `low` times in `length` positions are divided, those that
    turn more than `high` times are kept, and between the two it is in proportion (Llama 3.1)."""
    factor: float = 8.0
    """How many times longer rows may be."""
    low: float = 1.0
    """Turns up to which frequencies are divided; of `llama3` alone."""
    high: float = 4.0
    """Turns from which frequencies are kept; of `llama3` alone."""
    length: int = 8192
    """Positions of a row before; of `llama3` alone."""

    def __post_init__(self):
        require(
            self.factor > 0 and self.length > 0,
            f"model.rope_scaling.factor={self.factor} and model.rope_scaling.length={self.length} "
            "must be positive",
        )
        require(
            0 < self.low < self.high,
            f"model.rope_scaling.low={self.low} must be positive and below "
            f"model.rope_scaling.high={self.high}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style transformer: pre-RMSNorm, RoPE, SwiGLU, no biases, untied embeddings."""

    family: Literal["transfusion", "chameleon", "llama"] = "transfusion"
    """What images are to the model: diffused (the paper), tokens like text, which are the codes of
    a VQ autoencoder (Chameleon, arXiv 2405.09818), or nothing: text alone (Llama 2)."""
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
    norm_placement: Literal["pre", "post"] = "pre"
    """Where a block's norms are: before attention and feed-forward layer, or after them, as in
    Chameleon: h = x + norm(layer(x))."""
    qk_norm: bool = False
    """Layer norm of queries and keys, in every head, before RoPE (Chameleon; Dehghani et al. 2023,
    arXiv 2302.05442)."""
    experts: Literal["shared", "modality"] = "shared"
    """Whose weights a position multiplies: those of all positions, or those of its modality: text
    and image patches each have queries, keys, values, outputs, feed-forward layers and norms of
    their own (Mixture-of-Transformers, arXiv 2411.04996)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Parameters, softmax, norms and losses are float32 whatever this says."""
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether the patches of one image see one another, or only those before them (Table 5)."""
    patch_encoder: Literal["linear", "unet"] = "linear"
    """From patches to vectors and back: a linear layer each way, or the two halves of a U-Net
    (section 4.3)."""
    unet_widths: tuple[int, ...] = ()
    """Channels of the U-Net at each resolution, that of the image first: log2(image.patch) + 1 of
    them. Empty: those that make about 0.27 B parameters, as in the paper."""
    unet_blocks: int = 2
    """Residual blocks of the U-Net at each resolution, in each of its halves (our choice)."""
    unet_loop: Literal["auto", "scan", "unroll"] = "auto"
    """Whether the compiled step loops over the residual blocks of a resolution or writes them out.
    The compiler of TPUs takes seconds for every convolution that is written; that of CPUs computes
    convolutions in a loop ten times slower. `auto` is `scan` on TPU, else `unroll`."""
    timestep: Literal["before", "after"] = "before"
    """Where the timestep embedding is added: to the patch vector before the linear layer (the
    paper), or to the layer's output, where it cannot be mistaken for the content of a small
    patch."""
    patch_position: Literal["rope", "learned"] = "rope"
    """How a patch knows its place in the image: by RoPE alone, as text does, or by a learned
    vector as well (our choice; the paper is silent). With the vector, small models learn to read
    images sooner (docs/design.md, log)."""
    remat: Literal["none", "minimal", "attention", "full", "offload"] = "full"
    """What the backward pass recomputes: nothing; all but attention and the products with
    parameters; all but attention (not `dense`); or every layer from its input, which
    `offload` keeps in the memory of an accelerator's host."""
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    """Whether the compiled step loops over the layers or writes them out, which needs a `remat`
    that keeps much: `none` or `minimal`. A loop compiles once for all layers, and copies what each
    keeps for the backward pass into one array. `auto` is `unroll` on a GPU where it can be, else
    `scan`."""
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
        self._check_family()
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
            self.norm_epsilon > 0 or (self.norm_epsilon == 0 and self.norm_placement == "pre"),
            f"model.norm_epsilon={self.norm_epsilon} must not be negative, nor 0 with norms after "
            "the layers, where that of a padding position would be 0 / 0",
        )
        require(
            self.layer_loop != "unroll" or self.remat in ("none", "minimal"),
            f"model.layer_loop='unroll' would lose the memory that model.remat={self.remat!r} "
            "saves; it takes none or minimal",
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

    def _check_family(self):
        require(
            self.family == "transfusion" or self.image_attention == "causal",
            f"model.image_attention={self.image_attention!r}: a {self.family} predicts one token "
            "after another, so it must be 'causal'",
        )
        unet = self.patch_encoder == "unet"
        require(
            not unet or self.family == "transfusion",
            f"model.patch_encoder='unet' is for images that are diffused, not for a {self.family}",
        )
        require(
            not unet or self.timestep == "before",
            "model.timestep is of linear patches: a U-Net has the timestep in its blocks",
        )
        require(
            unet or not self.unet_widths,
            f"model.unet_widths={self.unet_widths} needs model.patch_encoder='unet'",
        )
        require(
            self.experts == "shared" or self.family == "transfusion",
            f"model.experts={self.experts!r} is for images that are diffused, not for a "
            f"{self.family}",
        )
        require(
            min(self.unet_widths, default=1) > 0 and self.unet_blocks > 0,
            f"model.unet_widths={self.unet_widths} and model.unet_blocks={self.unet_blocks} must "
            "be positive",
        )

    @property
    def images(self) -> Literal["latents", "codes", "none"]:
        """What the model takes for images: pixels or latents, which it diffuses; codes, which are
        tokens; or none."""
        return {"transfusion": "latents", "chameleon": "codes", "llama": "none"}[self.family]

    def mutual_patches(self, image: ImageConfig) -> int:
        """Consecutive patches that all see one another: those of an image, or 1, each for
        itself."""
        return image.patches if self.image_attention == "bidirectional" else 1

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        return self.mlp_width or -(-8 * self.width // 3 // 256) * 256
