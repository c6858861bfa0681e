"""Sums in words: text whose right continuation is known.

A pair of numbers is held out in both orders and in every wording, so no held-out sum can be
answered from a sum of the same two numbers in training. To answer it, a model must have learned to
add. Small models recall the sums of training and miss most others; on `comparisons` they do better.
"""

import itertools

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.sources.sentences import Sentences

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
LARGEST = 10
HELD_OUT = 7
"""Of the 66 pairs of numbers, whatever their order, those that training never shows."""
WORDINGS = ("{} plus {} is", "the sum of {} and {} is", "adding {} and {} gives")


def problems(split: str) -> list[tuple[str, str]]:
    """(prompt, answer), as in ("two plus three is", "five"), of "train" or "held_out".

    Each pair of numbers comes in both orders and in every wording.
    """
    pairs = list(itertools.combinations_with_replacement(range(LARGEST + 1), 2))
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    return [
        (wording.format(NUMBERS[a], NUMBERS[b]), NUMBERS[a + b])
        for pair in (pairs[i] for i in sorted(chosen))
        for a, b in sorted({pair, pair[::-1]})
        for wording in WORDINGS
    ]


def source(experiment: Experiment, split: str) -> Sentences:
    """Each problem with its answer."""
    return Sentences([f"{prompt} {answer}" for prompt, answer in problems(split)])
