"""Prompts of the suite `scenes`, by GenEval's categories (Ghosh et al. 2023, 2310.11513)."""

import itertools
from random import Random

from transfusion_jax.data.sources.scenes.scene import COLOURS, KINDS, LARGEST
from transfusion_jax.data.sources.scenes.source import NOVEL_PAIRS
from transfusion_jax.data.sources.scenes.words import RELATIONS, choose, counted

SEEN_PAIRS = sorted(set(itertools.product(COLOURS, KINDS)) - NOVEL_PAIRS)
"""(colour, kind) that training shows."""


def prompts(category: str, count: int) -> list[str]:
    """The first `count` prompts of one of `PROMPTS`."""
    rng = Random(f"prompts {category}")
    return [PROMPTS[category](rng, number) for number in range(count)]


def _single_object(rng: Random, number: int) -> str:
    return counted(choose(tuple(KINDS), rng), 1)


def _two_objects(rng: Random, number: int) -> str:
    return " and ".join(_two_kinds(rng))


def _counting(rng: Random, number: int) -> str:
    return counted(choose(tuple(KINDS), rng), 2 + number % (LARGEST - 1))


def _colours(rng: Random, number: int) -> str:
    return counted(" ".join(choose(SEEN_PAIRS, rng)), 1)


def _position(rng: Random, number: int) -> str:
    return f" {choose(tuple(RELATIONS), rng)} ".join(_two_kinds(rng))


def _colour_attribution(rng: Random, number: int) -> str:
    return _two_pairs(choose(SEEN_PAIRS, rng), rng)


def _compositional(rng: Random, number: int) -> str:
    pair = choose(sorted(NOVEL_PAIRS), rng)
    return _two_pairs(pair, rng) if number % 2 else counted(" ".join(pair), 1)


def _two_kinds(rng: Random) -> tuple[str, str]:
    kind = choose(tuple(KINDS), rng)
    return counted(kind, 1), counted(choose([other for other in KINDS if other != kind], rng), 1)


def _two_pairs(first: tuple[str, str], rng: Random) -> str:
    """This pair and one seen in training, of another colour and another kind."""
    second = choose(
        [pair for pair in SEEN_PAIRS if pair[0] != first[0] and pair[1] != first[1]], rng
    )
    return " and ".join(counted(" ".join(pair), 1) for pair in (first, second))


PROMPTS = {
    "single_object": _single_object,
    "two_objects": _two_objects,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour_attribution": _colour_attribution,
    "compositional": _compositional,
}
