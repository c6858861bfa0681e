"""One experiment as frozen, typed data.

An experiment file returns an `Experiment`; the command line overrides its fields by dotted name; the resolved
value is stored in the run directory as `config.json` and is enough to reload the run. A value that cannot
work raises `ValueError` at construction. Defaults are the paper's (arXiv 2408.11039, sections 3.3 and 4.1)
where the paper gives one; where it is silent the field says "our choice".
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transfusion_jax.errors import require


@dataclass(frozen=True)
class ImageConfig:
    """The image grid that the transformer sees: VAE latents, or pixels when `autoencoder` is empty."""

    height: int = 32
    width: int = 32
    channels: int = 8
    patch: int = 2
    """Side of a square patch, in latent pixels (k in the paper's section 4.3)."""

    def __post_init__(self):
        require(
            min(self.height, self.width, self.channels, self.patch) > 0,
            f"image sizes must be positive: {self}",
        )
        require(
            self.height % self.patch == 0 and self.width % self.patch == 0,
            f"image.patch={self.patch} must divide image.height={self.height} and image.width={self.width}",
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
    width: int = 768
    heads: int = 12
    kv_heads: int = 0
    """Key and value heads; 0 means as many as `heads`."""
    mlp_width: int = 0
    """Feed-forward width; 0 means Llama's: 2/3 of 4 widths, rounded up to a multiple of 256."""
    vocab_size: int = 32_128
    """Embedding rows: the tokenizer's entries and the special tokens, rounded up so that the mesh divides them."""
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Parameters, softmax, norms and losses are float32 whatever this says."""
    timestep: Literal["before", "after"] = "before"
    """Where the timestep embedding is added: to the patch vector before the linear layer (the paper), or to
    the linear layer's output, where it cannot be mistaken for the content of a small patch."""
    patch_position: Literal["rope", "learned"] = "rope"
    """How a patch knows its place in the image: by RoPE alone, as text does, or by a learned vector as well (our
    choice; the paper is silent). The vector makes small models learn to read images sooner (docs/design.md, log)."""
    remat: Literal["none", "minimal", "attention", "full", "offload"] = "full"
    """What the backward pass recomputes: nothing; all but the products with parameters; all but attention (`chunked`
    and `pallas` only); or every layer from its input, which `offload` keeps in the memory of an accelerator's host."""
    attention: Literal["auto", "chunked", "dense", "pallas", "tokamax"] = "auto"
    """`pallas` runs on TPU, `tokamax` on GPU (`pip install 'transfusion-jax[gpu]'`), the others anywhere; `dense`
    builds all the scores. `auto` is `pallas` on TPU, `tokamax` on GPU if it is installed, else `chunked`."""
    attention_block: int = 0
    """Positions of a block of `chunked` and `pallas`, a multiple of 128 for the latter; 0 means 128 and 512.
    `auto` leaves to `pallas` what does not fit it."""

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
        require(self.mlp_width >= 0, f"model.mlp_width={self.mlp_width} must not be negative")
        require(
            self.attention_block >= 0,
            f"model.attention_block={self.attention_block} must not be negative",
        )
        require(
            self.attention != "pallas" or self.attention_block % 128 == 0,
            f"model.attention_block={self.attention_block} must be a multiple of 128 for model.attention='pallas'",
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


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Literal["cosine", "flow"] = "cosine"
    steps: int = 1000
    """T: training timesteps, 0 (almost clean) to T - 1 (almost noise)."""
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    noise_limit: int = 500
    """Timesteps of an image that comes before its caption are drawn below this (Table 8); T switches it off."""

    def __post_init__(self):
        require(self.steps > 1, f"diffusion.steps={self.steps} must be at least 2")
        require(
            0 < self.noise_limit <= self.steps,
            f"diffusion.noise_limit={self.noise_limit} must be in 1..diffusion.steps={self.steps}",
        )


@dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn; `generate` can override steps, guidance and temperature."""

    kind: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 250
    guidance: float = 3.0
    """Weight w of classifier-free guidance: uncond + w * (cond - uncond); 1 is no guidance."""
    clip: float = 10.0
    """Clip the predicted clean image to [-clip, clip] at every step; 0 never. 1 suits pixels in [-1, 1], the
    default is far outside latents of unit variance."""
    context_timestep: int = 0
    """The timestep at which finished images are seen by what follows them. They are clean, so 0; small models have
    rarely been shown exactly 0, and read images better at a little more (our choice)."""
    temperature: float = 0.0
    """Of text; 0 is greedy (the paper)."""
    max_tokens: int = 1024
    """Positions that a request may add after its prompt, those of images included. The paper's image
    takes 258."""

    def __post_init__(self):
        require(self.steps > 0, f"sampler.steps={self.steps} must be positive")
        require(self.guidance >= 0, f"sampler.guidance={self.guidance} must not be negative")
        require(self.clip >= 0, f"sampler.clip={self.clip} must not be negative")
        require(
            self.temperature >= 0, f"sampler.temperature={self.temperature} must not be negative"
        )
        require(self.max_tokens > 0, f"sampler.max_tokens={self.max_tokens} must be positive")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents and its share of the rows (rows are equally long, so also of the tokens)."""

    name: str = "synthetic"
    """One that is built in (`data/sources.py`), or a directory of prepared data."""
    weight: float = 1.0

    def __post_init__(self):
        require(
            self.weight >= 0, f"weight={self.weight} of source {self.name!r} must not be negative"
        )


@dataclass(frozen=True)
class PhaseConfig:
    """Other weights of the sources from a given point of the run on, as in the last 1 % of section 4.4."""

    start: float
    """Fraction of the run's steps."""
    weights: tuple[float, ...]
    """One for each source."""

    def __post_init__(self):
        require(0 < self.start < 1, f"start={self.start} of a phase must be between 0 and 1")
        require(
            min(self.weights, default=-1) >= 0,
            f"weights={self.weights} of a phase must not be negative",
        )


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    phases: tuple[PhaseConfig, ...] = ()
    """Changes of the weights, in the order of their starts."""
    max_epochs: float = 4.0
    """A source that the run reads more often than this is named when it begins (data read up to four times is about
    as good as new: Muennighoff et al. 2023, arXiv 2305.16264)."""
    row_length: int = 4096
    batch_rows: int = 512
    """Rows of the global batch: 512 rows of 4,096 are the paper's 2 M tokens."""
    image_first: float = 0.2
    """Share of text-image pairs that come image first; the others come caption first."""
    caption_dropout: float = 0.1
    """Share of caption-first pairs whose caption is left out, for guidance (our choice; the paper is silent)."""
    prefetch: int = 8
    """Batches read ahead of the step."""

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources must name at least one source")
        starts = [phase.start for phase in self.phases]
        require(
            starts == sorted(set(starts)),
            f"data.phases must start one after another, not at {starts}",
        )
        weights = [
            [source.weight for source in self.sources],
            *(phase.weights for phase in self.phases),
        ]
        for w in weights:
            require(
                len(w) == len(self.sources),
                f"data.phases: {w} are not the weights of {len(self.sources)} sources",
            )
            require(sum(w) > 0, f"data: the weights {w} leave no source")
        for number, source in enumerate(self.sources):
            require(
                any(w[number] > 0 for w in weights),
                f"data: source {source.name!r} has no weight at any time",
            )
        require(self.max_epochs > 0, f"data.max_epochs={self.max_epochs} must be positive")
        require(self.row_length > 1, f"data.row_length={self.row_length} must be at least 2")
        require(self.batch_rows > 0, f"data.batch_rows={self.batch_rows} must be positive")
        require(self.prefetch > 0, f"data.prefetch={self.prefetch} must be positive")
        for name in ("image_first", "caption_dropout"):
            require(
                0 <= getattr(self, name) <= 1, f"data.{name}={getattr(self, name)} must be in 0..1"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    path: str = ""
    """A sentencepiece `.model`; empty: one is trained on the sources' own text and kept in the run directory."""
    vocab_size: int = 32_000
    """Entries of a tokenizer trained on the spot, at most."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-4
    final_learning_rate: float = 1.5e-5
    warmup_steps: int = 4000
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; norm scales are not decayed (our choice)."""
    clip_norm: float = 1.0

    def __post_init__(self):
        require(
            self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive"
        )
        require(
            self.warmup_steps >= 0,
            f"optimizer.warmup_steps={self.warmup_steps} must not be negative",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 for at most one axis means all that are left."""

    data: int = -1
    """Rows; the only axis that crosses the network between slices."""
    fsdp: int = 1
    """Rows, parameters and optimizer."""
    sequence: int = 1
    """Positions of a row, for rows longer than a device can hold; parameters and optimizer too."""
    tensor: int = 1
    """Heads, feed-forward and vocabulary."""
    topology: str = ""
    """The TPU slice that it is made for, as in v5p:4x4x4; `plan` compiles for it, training takes what it finds."""

    @property
    def axes(self) -> dict[str, int]:
        return {name: size for name, size in dataclasses.asdict(self).items() if name != "topology"}

    def __post_init__(self):
        sizes = list(self.axes.values())
        require(
            all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh axes must be positive, and at most one -1: {self.axes}",
        )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 250_000
    seed: int = 0
    image_loss_weight: float = 5.0
    """Lambda of L = L_LM + lambda * L_DDPM."""
    accumulation: int = 1
    """Parts of a batch that take their turns: less memory, the gradient of the whole batch."""
    vocab_chunk: int = 512
    """Positions of a row whose logits exist at one time."""
    ema_decay: float = 0.9999
    """Of the weights that are sampled and evaluated (our choice; the paper is silent)."""
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_skipped_steps: int = 10
    """Training stops after so many steps in a row whose gradients are not finite."""

    def __post_init__(self):
        for name in (
            "steps",
            "accumulation",
            "vocab_chunk",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
        ):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1)")


@dataclass(frozen=True)
class Experiment:
    """Everything that varies between two runs."""

    name: str
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: tuple[str, ...] = ()
    """Suites run after the last step (names in `evaluation/suite.py`)."""

    def __post_init__(self):
        shortest = self.image.span + 2
        require(
            self.data.row_length >= shortest,
            f"data.row_length={self.data.row_length} is shorter than one image: BOS, BOI, "
            f"{self.image.patches} patches, EOI and EOS take {shortest}",
        )
        require(
            self.sampler.max_tokens >= self.image.span,
            f"sampler.max_tokens={self.sampler.max_tokens} has no room for an image: BOI, "
            f"{self.image.patches} patches and EOI take {self.image.span} positions",
        )
        require(
            self.sampler.steps <= self.diffusion.steps,
            f"sampler.steps={self.sampler.steps} must not exceed diffusion.steps={self.diffusion.steps}",
        )
        require(
            0 <= self.sampler.context_timestep < self.diffusion.steps,
            f"sampler.context_timestep={self.sampler.context_timestep} must be in 0..{self.diffusion.steps - 1}",
        )
        require(
            self.data.batch_rows % self.train.accumulation == 0,
            f"train.accumulation={self.train.accumulation} must divide data.batch_rows={self.data.batch_rows}",
        )

    @property
    def image_slots(self) -> int:
        """M: the most images that fit into one row."""
        return self.data.row_length // self.image.span
