"""Strict settings: eight CPU devices, no implicit promotion, array shapes checked at run time.

Warnings are errors by `filterwarnings` in pyproject.toml. What commands keep in the user's cache
(compiled programs, plans) is kept for this session alone, and shared by its processes.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="transfusion_jax_cache_")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A directory of your own in this variable is left alone, and spares later sessions as well.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tests compile for longer than they run. This is not how a user's program is compiled: that is
# what tests/test_end_to_end.py sees, whose processes have no such flags.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that later ones refuse
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

CHECKED = [
    "transfusion_jax.model.attention",
    "transfusion_jax.model.losses",
    "transfusion_jax.pretraining.objective",
    "transfusion_jax.diffusion",
]
hook = install_import_hook(CHECKED, "beartype.beartype")
hook.__enter__()

from transfusion_jax.config import (  # noqa: E402  (after the hook)
    DataConfig,
    Experiment,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from transfusion_jax.data.sources.registry import load_sources  # noqa: E402
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    """The digits experiment, small enough that a step takes milliseconds."""
    return Experiment(
        name="small",
        image=ImageConfig(height=8, width=8, channels=1, patch=2),
        model=ModelConfig(
            layers=2,
            width=64,
            heads=4,
            kv_heads=2,
            mlp_width=96,
            vocab_size=512,
            compute_dtype="float32",
            attention_block=32,
        ),
        data=DataConfig(
            sources=(SourceConfig("digits"), SourceConfig("sums")), row_length=96, batch_rows=8
        ),
        tokenizer=TokenizerConfig(vocab_size=480),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=5),
        train=TrainConfig(steps=40, vocab_chunk=40, log_every=1, checkpoint_every=10),
        sampler=SamplerConfig(steps=4, clip=1.0, context_timestep=7, max_tokens=30),
    )


@pytest.fixture(scope="session")
def tokenizer(experiment: Experiment) -> Tokenizer:
    texts = [text for source in load_sources(experiment, "train") for text in source.texts()]
    return train_tokenizer(texts, experiment.tokenizer.vocab_size)
