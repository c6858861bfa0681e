"""The paper's settings by name."""

from transfusion_jax.config.experiment import Experiment
from transfusion_jax.config.model import ModelConfig

TABLE_2 = {
    "0.16B": dict(layers=16, width=768, heads=12),
    "0.37B": dict(layers=24, width=1024, heads=16),
    "0.76B": dict(layers=24, width=1536, heads=24),
    "1.4B": dict(layers=24, width=2048, heads=16),
    "7B": dict(layers=32, width=4096, heads=32),
}


def paper(size: str) -> Experiment:
    """The paper's controlled setting (section 4.1) at one of the sizes of Table 2, linear 2x2
    patches."""
    return Experiment(name=f"transfusion_{size}", model=ModelConfig(**TABLE_2[size]))
