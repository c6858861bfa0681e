"""Comparisons in words: text on which a small model can generalise.

A pair of numbers is held out in both orders and in both questions, so training never says how its
two numbers compare. It follows from how they compare with others: 3 < 5 and 5 < 8. A model that
just answers with one of the two numbers is right half of the time.
"""

import itertools

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.sources.sentences import Sentences
from transfusion_jax.data.sources.sums import NUMBERS

HELD_OUT = 21
"""Of the 210 pairs of different numbers from zero to twenty, those that training never shows."""
QUESTIONS = {"the larger of {} and {} is": max, "the smaller of {} and {} is": min}


def problems(split: str) -> list[tuple[str, str]]:
    """(prompt, answer), as in ("the larger of two and nine is", "nine"), of "train" or "held_out".

    Each pair of numbers comes in both orders and in both questions.
    """
    pairs = list(itertools.combinations(range(len(NUMBERS)), 2))
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = order[HELD_OUT:] if split == "train" else order[:HELD_OUT]
    return [
        (question.format(NUMBERS[a], NUMBERS[b]), NUMBERS[answer(a, b)])
        for pair in (pairs[i] for i in sorted(chosen))
        for a, b in (pair, pair[::-1])
        for question, answer in QUESTIONS.items()
    ]


def source(experiment: Experiment, split: str) -> Sentences:
    """Each problem with its answer."""
    return Sentences([f"{prompt} {answer}" for prompt, answer in problems(split)])
