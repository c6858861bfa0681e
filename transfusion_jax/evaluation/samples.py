"""Samples while a run trains: what the averaged weights answer to fixed prompts."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from transfusion_jax.config import Experiment
from transfusion_jax.generation.engine import engine_without_weights
from transfusion_jax.images import to_uint8
from transfusion_jax.pretraining.run import tokenizer_of
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.observation import Moved, Observation, Observer

SEED = 0
"""Of every sample: two steps differ by their weights alone."""


def sampler(experiment: Experiment, directory: Path, mesh: Mesh, report: Report) -> Observer:
    """What answers `train.sample_prompts` every `train.sample_every` steps, on the run's devices.

    The answer to prompt n is the text `samples/n`, in which `[image]` stands for each picture, and
    the pictures `samples/n/0`, `samples/n/1`, ... The prompts are one batch of the engine, and row
    n has random draws of its own, so only the first answer is what `generate` gives alone.

    Raises:
      ValueError: a prompt is longer than a row, or what the model draws are no pictures.
    """
    prompts = [[prompt] for prompt in experiment.train.sample_prompts]
    tokenizer = tokenizer_of(experiment, directory)
    engine = engine_without_weights(experiment, tokenizer, directory, mesh, report)
    engine.require_pictures()
    engine.check(prompts)

    def look(step: int, state: Any, moved: Moved) -> Observation:
        answers = engine.with_weights(state.ema, moved).generate(prompts, SEED)
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
