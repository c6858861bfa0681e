"""Samples while a run trains: what the averaged weights answer to fixed prompts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transfusion_jax.autoencoder.codec import load_codec
from transfusion_jax.config import Experiment
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import to_uint8
from transfusion_jax.model.attention.platforms import for_platform
from transfusion_jax.model.build import abstract_model
from transfusion_jax.pretraining.run import tokenizer_of
from transfusion_jax.training.observation import Observation, Observer

SEED = 0
"""Of every sample: two steps differ by their weights alone."""


def sampler(experiment: Experiment, directory: Path) -> Observer:
    """What answers `train.sample_prompts` every `train.sample_every` steps, on the run's devices.

    The answer to prompt n is the text `samples/n`, in which `[image]` stands for each picture, and
    the pictures `samples/n/0`, `samples/n/1`, ...

    Raises:
      ValueError: a prompt is longer than a row.
    """
    settings = experiment.train
    prompts = [[prompt] for prompt in settings.sample_prompts]
    answer = _answerer(experiment, directory)
    answer(None).check(prompts)

    def observer(step: int, state: Any) -> Observation:
        if step % settings.sample_every and step != settings.steps:
            return Observation()
        answers = answer(state.ema).generate(prompts, SEED)
        texts = {}
        pictures = {}
        for number, ((prompt,), spans) in enumerate(zip(prompts, answers, strict=True)):
            words = [span if isinstance(span, str) else "[image]" for span in spans]
            texts[f"samples/{number}"] = f"{prompt} -> {' '.join(words)}"
            drawn = [span for span in spans if isinstance(span, np.ndarray)]
            pictures |= {
                f"samples/{number}/{i}": to_uint8(picture).reshape(picture.shape)
                for i, picture in enumerate(drawn)
            }
        return Observation(pictures=pictures, texts=texts)

    return observer


def _answerer(experiment: Experiment, directory: Path) -> Callable[[Any], Engine]:
    """The engine with given weights; what it compiles is kept from one call to the next."""
    model = replace(experiment.model, remat="none")
    model = for_platform(model, jax.local_devices()[0].platform)
    experiment = replace(experiment, model=model)
    graph, _ = abstract_model(experiment)
    codec = load_codec(directory / "autoencoder") if (directory / "autoencoder").is_dir() else None
    engine = Engine(experiment, tokenizer_of(experiment, directory), graph, {}, codec)

    def answer(parameters: Any) -> Engine:
        return engine.with_weights(parameters)

    return answer
