"""One experiment as frozen, typed data: what an experiment file imports.

| module | what it holds |
|---|---|
| `experiment.py` | the dataclasses, validated at construction |
| `presets.py` | the paper's settings |
| `stored.py` | an experiment as JSON, and what may change when a run is resumed |
"""

from transfusion_jax.config.experiment import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    SamplerConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from transfusion_jax.config.presets import TABLE_2, paper

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
    "SamplerConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "paper",
]
