"""One experiment as frozen, typed data: what an experiment file imports.

| module | what it holds |
|---|---|
| `experiment.py` | `Experiment`, which has all the others as fields |
| `model.py` | the transformer and the image grid |
| `diffusion.py` | corruption in training, and sampling |
| `data.py` | sources, their mixture, rows, the tokenizer |
| `training.py` | optimizer, device mesh, the run |
| `processes.py` | how several processes find and watch one another |
| `presets.py` | the paper's settings |
| `fields.py` | the fields by dotted name, and checks of all of them |
| `stored.py` | an experiment as JSON, and what may change when a run is resumed |
"""

from transfusion_jax.config.data import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig
from transfusion_jax.config.diffusion import DiffusionConfig, SamplerConfig
from transfusion_jax.config.experiment import Experiment
from transfusion_jax.config.model import ImageConfig, ModelConfig, RopeScaling
from transfusion_jax.config.presets import (
    TABLE_2,
    chameleon,
    llama,
    paper,
    stabilised,
    unet,
)
from transfusion_jax.config.processes import ProcessesConfig
from transfusion_jax.config.training import MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
    "TABLE_2",
    "DataConfig",
    "DiffusionConfig",
    "Experiment",
    "ImageConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "ProcessesConfig",
    "RopeScaling",
    "SamplerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "chameleon",
    "llama",
    "paper",
    "stabilised",
    "unet",
]
