"""How images are corrupted in training, and drawn from noise."""

import math
from dataclasses import dataclass
from typing import Literal

from transfusion_jax.errors import require

LEAST, MOST = 1e-6, 1e6
"""Of settings of the sampler that are not 0; float32 computes with such numbers."""
MOST_TOKENS = 1 << 20
"""Of `max_tokens`: the cache has room for all of them."""
MOST_CANDIDATES = 1 << 10


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Literal["cosine", "linear", "flow"] = "cosine"
    """How signal and noise mix over time: variance-preserving, with a cosine (the paper) or with
    linearly rising beta (DDPM), or in a straight line (flow)."""
    steps: int = 1000
    """T: training timesteps, 0 (almost clean) to T - 1 (almost noise)."""
    prediction: Literal["epsilon", "v", "flow", "x"] = "epsilon"
    """What the model predicts of an image: its noise (the paper), v, the velocity of a flow, or the
    clean image (x)."""
    loss: Literal["prediction", "epsilon", "v", "flow", "x", "min_snr"] = "prediction"
    """What the squared error is of: the prediction, or another quantity, computed from it, which
    weighs timesteps differently. `min_snr` is the error of x weighted by min(SNR, min_snr_gamma)
    (Hang et al. 2023, arXiv 2303.09556)."""
    min_snr_gamma: float = 5.0
    """The largest weight of `min_snr`."""
    snr_scale: float = 1.0
    """Multiplies the schedule's signal-to-noise ratio (`diffusion/schedule.py`). Below 1 there is
    more noise, for large pictures; above 1 there is less, for pictures of few pixels."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn in training: all alike (the paper), or more often where they teach
    most: a share of their limit whose logit is normal (Esser et al. 2024, arXiv 2403.03206,
    section 3.1). Then few finished images are almost clean, which `sampler.context_timestep` should
    allow for."""
    timestep_mean: float = 0.0
    """Of the logit of `logit_normal`: above 0 there is more noise."""
    timestep_std: float = 1.0
    """Its standard deviation: the smaller, the fewer are near 0 or the limit."""
    noise_limit: int = 0
    """Timesteps of an image that something follows, as its caption does, are drawn below this (500
    in Table 8). 0 and T switch it off, as in the controlled setting of section 4.1."""

    def __post_init__(self):
        require(self.steps > 1, f"diffusion.steps={self.steps} must be at least 2")
        require(
            0 <= self.noise_limit <= self.steps,
            f"diffusion.noise_limit={self.noise_limit} must be in 0..diffusion.steps={self.steps}",
        )

        for name in ("snr_scale", "min_snr_gamma", "timestep_std"):
            value = getattr(self, name)
            require(value > 0, f"diffusion.{name}={value} must be positive")

    @property
    def context_limit(self) -> int:
        """Timesteps of an image that something follows are drawn below this."""
        return self.noise_limit or self.steps


@dataclass(frozen=True)
class SamplerConfig:
    """How images are drawn; `generate` can override steps, guidance and temperature."""

    kind: Literal["ddpm", "ddim"] = "ddpm"
    """`ddpm` adds noise at every step (ancestral sampling), `ddim` is deterministic."""
    steps: int = 250
    """Denoising steps of an image; at most `diffusion.steps`."""
    guidance: float = 3.0
    """Weight w of classifier-free guidance: uncond + w * (cond - uncond); 1 is no guidance."""
    clip: float = 10.0
    """Clip the predicted clean image to [-clip, clip] at every step; 0 never. 1 suits pixels in
    [-1, 1]; the default is far outside latents of unit variance."""
    context_timestep: int = 0
    """The timestep at which finished images are seen by what follows them. They are clean, so 0;
    small models have rarely been shown exactly 0, and read images better at a little more (our
    choice)."""
    candidates: int = 1
    """Images drawn for every one that is kept: that behind which the model finds the text before
    it likeliest, as it reads captions of images. 1 draws one (the paper)."""
    temperature: float = 0.0
    """Of text; 0 is greedy (the paper)."""
    image_temperature: float = 1.0
    """Of image codes, where images are tokens (Chameleon); 0 takes the likeliest."""
    max_tokens: int = 1024
    """Positions that a request may add after its prompt, those of images included. The paper's
    image takes 258. Prompt and answer may be longer than `data.row_length`, but positions beyond
    it were never trained; `generate` says so."""

    def __post_init__(self):
        require(self.steps > 0, f"sampler.steps={self.steps} must be positive")
        require(
            1 <= self.candidates <= MOST_CANDIDATES,
            f"sampler.candidates={self.candidates} must be in 1..{MOST_CANDIDATES:,}",
        )
        for name in ("guidance", "clip", "temperature", "image_temperature"):
            value = getattr(self, name)
            require(math.isfinite(value), f"sampler.{name}={value} must be a finite number")
            require(value >= 0, f"sampler.{name}={value} must not be negative")
            require(
                value == 0 or LEAST <= value <= MOST,
                f"sampler.{name}={value} must be 0 or in {LEAST:g}..{MOST:g}",
            )
        require(self.max_tokens > 0, f"sampler.max_tokens={self.max_tokens} must be positive")
        require(
            self.max_tokens <= MOST_TOKENS,
            f"sampler.max_tokens={self.max_tokens} must be at most {MOST_TOKENS:,}",
        )
