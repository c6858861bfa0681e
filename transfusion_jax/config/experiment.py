"""One experiment as frozen, typed data.

An experiment file returns an `Experiment`; the command line overrides its fields by dotted name;
the resolved value is stored in the run directory as `config.json`, which is enough to reload the
run. A value that cannot work raises `ValueError` at construction. Defaults are the paper's (arXiv
2408.11039, sections 3.3 and 4.1) where it gives one; where it is silent the field says "our
choice".
"""

from dataclasses import dataclass
from typing import ClassVar

from transfusion_jax.config.data import DataConfig, TokenizerConfig
from transfusion_jax.config.diffusion import DiffusionConfig, SamplerConfig
from transfusion_jax.config.fields import require_finite, require_seed, require_types
from transfusion_jax.config.model import UNET_WIDTHS, ImageConfig, ModelConfig
from transfusion_jax.config.processes import ProcessesConfig
from transfusion_jax.config.training import MeshConfig, OptimizerConfig, TrainConfig
from transfusion_jax.errors import require


@dataclass(frozen=True)
class Experiment:
    """Everything that varies between two runs."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (
        "mesh.",
        "processes.",
        "model.remat",
        "model.layer_loop",
        "model.unet_loop",
        "model.attention",
        "data.prefetch",
        "data.max_epochs",
        "train.accumulation",
        "train.vocab_chunk",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.failed_save",
        "train.max_skipped_steps",
        "train.validate_every",
        "train.validation_rows",
        "train.sample_every",
        "train.sample_prompts",
        "train.spike_",
        "train.stall_steps",
        "train.wandb_project",
        "sampler.",
        "evaluation",
    )
    """Prefixes of the fields that may change when a run is resumed."""

    name: str
    """Names the run directory, `runs/<name>`, and a point of a sweep."""
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sampler: SamplerConfig = SamplerConfig()
    mesh: MeshConfig = MeshConfig()
    processes: ProcessesConfig = ProcessesConfig()
    evaluation: tuple[str, ...] = ()
    """Suites run after the last step (names in `evaluation/suite.py`)."""

    def __post_init__(self):
        require_types(self)
        require_finite(self)
        require_seed(self.train.seed)
        self._check_images()
        images, shortest = self.model.images != "none", self.image.span + 2
        require(
            not images or self.data.row_length >= shortest,
            f"data.row_length={self.data.row_length} is shorter than one image: BOS, BOI, "
            f"{self.image.patches} patches, EOI and EOS take {shortest}",
        )
        require(
            not images or self.sampler.max_tokens >= self.image.span,
            f"sampler.max_tokens={self.sampler.max_tokens} has no room for an image: BOI, "
            f"{self.image.patches} patches and EOI take {self.image.span} positions",
        )
        require(
            self.sampler.steps <= self.diffusion.steps,
            f"sampler.steps={self.sampler.steps} must not exceed "
            f"diffusion.steps={self.diffusion.steps}",
        )
        require(
            0 <= self.sampler.context_timestep < self.diffusion.steps,
            f"sampler.context_timestep={self.sampler.context_timestep} must be in "
            f"0..{self.diffusion.steps - 1}",
        )
        require(
            self.data.batch_rows % self.train.accumulation == 0,
            f"train.accumulation={self.train.accumulation} must divide "
            f"data.batch_rows={self.data.batch_rows}",
        )

    def _check_images(self):
        """That the model and the images fit."""
        family, codes, patch = self.model.family, self.image.codes, self.image.patch
        require(
            (self.model.images == "codes") == (codes > 0) or self.model.images == "none",
            f"model.family={family!r} with image.codes={codes}: a chameleon needs the codes of a "
            "VQ autoencoder (`prepare --autoencoder`), and only a chameleon takes them",
        )
        if self.model.patch_encoder == "unet":
            levels = patch.bit_length()
            require(
                patch > 1 and patch == 1 << (levels - 1),
                f"image.patch={patch}: a U-Net halves its image, so a patch is 2, 4, 8, ...",
            )
            widths = self.model.unet_widths
            require(
                len(widths) == levels or (not widths and patch in UNET_WIDTHS),
                f"model.unet_widths={widths} must be {levels}, one for each resolution from the "
                f"image to its {patch}x{patch} patches",
            )

    @property
    def image_slots(self) -> int:
        """M: images that a row has room for, as many as fit; of text alone, the one that a batch
        must have."""
        fit = self.data.row_length // self.image.span
        return 1 if self.model.images == "none" else max(fit, 1)
