"""How it is trained: the optimizer, the devices, the run."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transfusion_jax.errors import require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon, with linear warm-up and cosine decay."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon` makes the updates of matrices inside the transformer's layers orthogonal (Jordan et
    al. 2024), as large as AdamW's (Liu et al. 2025, arXiv 2502.16982); the rest is
    AdamW's, with Nesterov's momentum."""
    learning_rate: float = 3e-4
    """The peak, at the end of the warm-up."""
    final_learning_rate: float = 1.5e-5
    """After the last step; equal to the peak for a constant rate."""
    warmup_steps: int = 4000
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    b1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    b2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    momentum: float = 0.95
    """Muon's decay of the mean of the gradients."""
    epsilon: float = 1e-8
    """AdamW's addition to the denominator."""
    weight_decay: float = 0.1
    """On matrices only; norm scales are not decayed (our choice)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm where theirs is larger."""

    def __post_init__(self):
        peak = self.learning_rate
        require(peak > 0, f"optimizer.learning_rate={peak} must be positive")
        require(
            0 <= self.final_learning_rate <= peak,
            f"optimizer.final_learning_rate={self.final_learning_rate} must be between 0 and "
            f"optimizer.learning_rate={peak}",
        )
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}={value} must not be negative")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value} must be in [0, 1)")
        for name in ("epsilon", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}={value} must be positive")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, which means all devices that are left."""

    data: int = -1
    """Rows; the only axis that crosses the network between slices."""
    fsdp: int = 1
    """Rows, parameters and optimizer state."""
    sequence: int = 1
    """Positions of a row, for rows longer than a device can hold; parameters and optimizer state
    too."""
    tensor: int = 1
    """Heads, feed-forward and vocabulary."""
    topology: str = ""
    """The TPU slice that the mesh is made for, as in v5p:4x4x4. `plan` compiles for it; training
    uses the devices that it finds."""

    @property
    def axes(self) -> dict[str, int]:
        return {name: size for name, size in dataclasses.asdict(self).items() if name != "topology"}

    @property
    def whole_machine(self) -> bool:
        """Whether rows alone are cut, over as many devices as there are."""
        return self.axes == {"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1}

    def __post_init__(self):
        sizes = list(self.axes.values())
        require(
            all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
            f"mesh axes must be positive, and at most one -1: {self.axes}",
        )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 250_000
    """Steps of the whole run."""
    seed: int = 0
    """Of weights, data order, noise and timesteps."""
    initial: str = ""
    """A directory of weights that a new run starts from, an export (`safetensors`) or an import;
    the optimizer starts afresh, and the average from them. Empty: weights drawn from the seed."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by name or by patterns as of files: `embedding_VD`,
    `transformer.*`, `*norm*`. They stay bit for bit, and have no gradients and no moments."""
    image_loss_weight: float = 5.0
    """Lambda of L = L_LM + lambda * L_DDPM, where images are diffused."""
    z_loss: float = 0.0
    """Weight of log^2 Z, the squared logarithm of the denominator of every token's softmax (1e-5
    in Chameleon)."""
    accumulation: int = 1
    """Microbatches per step: less memory, same gradient."""
    vocab_chunk: int = 512
    """Positions of a row whose logits exist at one time."""
    ema_decay: float = 0.9999
    """Of the average of the weights, which is what is sampled and evaluated (our choice; the
    paper is silent)."""
    log_every: int = 10
    """Steps between two lines of `metrics.jsonl`."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Latest checkpoints to keep."""
    failed_save: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be saved does to the run: "continue" with training (the next
    one may succeed), or "stop"."""
    max_skipped_steps: int = 10
    """Training stops after this many steps in a row with non-finite gradients."""
    validate_every: int = 0
    """Steps between two measurements of the averaged weights on held-out rows; 0: none."""
    validation_rows: int = 64
    """At most so many held-out rows of each source."""
    sample_every: int = 0
    """Steps between two answers of the averaged weights to `sample_prompts`; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """The same at every time; answers are shown in TensorBoard."""
    spike_window: int = 100
    """Losses before a step that say what is usual."""
    spike_deviations: float = 12.0
    """A loss so many standard deviations above the usual is named, with its rows (our choice);
    0: never."""
    stall_steps: int = 5000
    """A loss that two blocks of so many steps have not lowered is named (our choice); 0: never."""
    wandb_project: str = ""
    """The project of Weights & Biases that metrics also go to; empty: none."""

    def __post_init__(self):
        for name in (
            "steps",
            "accumulation",
            "vocab_chunk",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
            "validation_rows",
            "spike_window",
        ):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        for name in ("validate_every", "sample_every", "spike_deviations", "stall_steps"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} must not be negative")
        require(
            not self.sample_every or len(self.sample_prompts) > 0,
            f"train.sample_every={self.sample_every} needs train.sample_prompts",
        )
        require(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1)")
        require(
            self.image_loss_weight >= 0,
            f"train.image_loss_weight={self.image_loss_weight} must not be negative",
        )
        require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative")
