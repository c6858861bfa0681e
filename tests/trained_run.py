"""A run directory with a checkpoint of random weights, for tests of exports."""

import functools
from dataclasses import replace
from pathlib import Path

import tiny
from exported import run_directory, weights

from transfusion_jax.config import Experiment
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = (
    "In the beginning the Universe was created. This has made a lot of people very angry.",
    "  two spaces before, 1234 and 3.14159 in between, and a tab\tat the end\t",
    "naïve café, Ελληνικά, русский, 日本語, עברית",
    "def main(argv):\n    return 0",
)
STEP = 7


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([text for text in TEXTS for _ in range(20)], 480)


def experiment(**model) -> Experiment:
    """`tiny.small()` with these fields of its model, and rows of the vocabulary to spare."""
    small = tiny.small()
    return replace(small, model=replace(small.model, vocab_size=512, **model))


def write_run(path: Path, run: Experiment, seed: int = 0) -> dict:
    """Fills a directory; returns the parameters, which are their average as well."""
    parameters = weights(run, seed)
    run_directory(path, run, (STEP,), tokenizer=tokenizer(), parameters=parameters)
    return parameters
