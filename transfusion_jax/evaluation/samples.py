"""Samples while a run trains: what the averaged weights answer to fixed prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.config import Experiment
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import to_uint8
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.build import abstract_model
from transfusion_jax.parallel.processes import is_leader
from transfusion_jax.parallel.rules import replicated
from transfusion_jax.pretraining.run import tokenizer_of
from transfusion_jax.training.observation import Observation, Observer

SEED = 0
"""Of every sample: two steps differ by their weights alone."""


def sampler(experiment: Experiment, directory: Path, mesh: Mesh) -> Observer:
    """What answers `train.sample_prompts` every `train.sample_every` steps.

    The answer to prompt n is the text `samples/n`, in which `[image]` stands for each picture, and
    the pictures `samples/n/0`, `samples/n/1`, ... It is what `generate` answers to the prompt.

    All processes gather the weights, whole, on each device; the leader generates, on one device.

    Raises:
      ValueError: a prompt is longer than a row.
    """
    prompts = [[prompt] for prompt in experiment.train.sample_prompts]
    engine = _engine(experiment, directory)
    engine.check(prompts)

    def look(step: int, state: Any) -> Observation:
        weights = jax.device_put(state.ema, replicated(mesh))
        if not is_leader():
            return Observation()
        here = jax.tree.map(lambda x: x.addressable_data(0), weights)
        answers = engine.with_weights(here).generate(prompts, SEED)
        texts = {}
        pictures = {}
        for number, ((prompt,), spans) in enumerate(zip(prompts, answers, strict=True)):
            words = [span if isinstance(span, str) else "[image]" for span in spans]
            texts[f"samples/{number}"] = f"{prompt} -> {' '.join(words)}"
            drawn = [span for span in spans if isinstance(span, np.ndarray)]
            for i, picture in enumerate(drawn):
                pictures[f"samples/{number}/{i}"] = to_uint8(picture).reshape(picture.shape)
        return Observation(pictures=pictures, texts=texts)

    return Observer(experiment.train.sample_every, look)


def _engine(experiment: Experiment, directory: Path) -> Engine:
    """The engine, without weights."""
    model = replace(experiment.model, remat="none")
    model = for_platform(model, jax.local_devices()[0].platform)
    experiment = replace(experiment, model=model)
    graph, _ = abstract_model(experiment)
    codec = load_codec(directory / "autoencoder") if (directory / "autoencoder").is_dir() else None
    return Engine(experiment, tokenizer_of(experiment, directory), graph, {}, codec)
