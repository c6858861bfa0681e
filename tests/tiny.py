"""A tiny experiment, random weights for it, and a tokenizer that needs no training."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.pretraining.state import blueprint


class Numbers:
    """A tokenizer whose text is the ids themselves: "5 9 7"."""

    bos, eos, boi, eoi, size = 1, 2, 38, 39, 40

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, continued=False) -> str:
        return " ".join(str(int(i)) for i in ids if i < self.boi)


TOKENIZER = Numbers()
IMAGE = ImageConfig(height=4, width=4, channels=1, patch=2)
DRAW = 3  # the token after which the models of the generation tests begin an image


def small(**changes) -> Experiment:
    """A tiny experiment, with numbers whose every use shows in a single step."""
    model = ModelConfig(
        layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, vocab_size=44, rope_theta=100.0,
        compute_dtype="float32", attention_block=16, **changes,
    )  # fmt: skip
    return Experiment(
        "reference",
        image=IMAGE,
        model=model,
        diffusion=DiffusionConfig(steps=100, noise_limit=50),
        data=DataConfig(row_length=48, batch_rows=4),
        optimizer=OptimizerConfig(
            learning_rate=2e-2,
            final_learning_rate=5e-3,
            warmup_steps=2,
            weight_decay=0.5,
            clip_norm=0.7,
        ),
        train=TrainConfig(steps=5, seed=3, accumulation=2, vocab_chunk=20, ema_decay=0.15),
        sampler=SamplerConfig(steps=4, max_tokens=20, context_timestep=7, clip=1.0),
    )


@functools.cache
def planned(experiment: Experiment):
    return blueprint(experiment, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def random_parameters(plan, seed: int = 0) -> dict:
    """Float32 weights under which every path carries a signal and rounding is not amplified."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        values = rng.standard_normal(leaf.shape)
        if name == "scale":
            return 1 + 0.3 * values
        if name == "embedding_VD":
            return values
        if name == "bias":
            return 0.3 * values
        if name == "kernel":  # of a convolution
            return values / np.sqrt(np.prod(leaf.shape[:-1]))
        if name == "out_NHD":
            return 0.5 * values / np.sqrt(leaf.shape[-3] * leaf.shape[-2])
        axis = -3 if name in ("q_DNH", "k_DKH", "v_DKH") else -2
        gain = {"q_DNH": 0.5, "down_FD": 0.5, "in_ZD": 2.0}.get(name, 1.0)
        return gain * values / np.sqrt(leaf.shape[axis])

    made = jax.tree_util.tree_map_with_path(draw, plan.abstract.parameters)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)


def fresh_state(plan, parameters: dict):
    """The state before the first step, placed as the step leaves it (so that it compiles once)."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.abstract)
    average = jax.tree.map(jnp.copy, parameters)
    state = replace(zeros, parameters=parameters, ema=average)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, plan.abstract))


def talkative(parameters: dict) -> dict:
    """Weights that begin an image after DRAW, seldom end, and heed more than the last token."""
    embedding = (0.1 * parameters["embedding_VD"]).at[DRAW].multiply(20.0)
    output = parameters["output_DV"].at[:, TOKENIZER.boi].set(0.2 * embedding[DRAW])
    output = output.at[:, TOKENIZER.eos].multiply(0.3)
    return {**parameters, "embedding_VD": embedding, "output_DV": output}
