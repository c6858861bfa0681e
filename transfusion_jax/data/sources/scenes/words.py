"""What is said about scenes: captions in many wordings, and edits that are instructions."""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from transfusion_jax.data.sources.scenes.scene import (
    COLOURS,
    GRID,
    KINDS,
    LARGEST,
    SIZES,
    Object,
    Scene,
)
from transfusion_jax.data.sources.sums import NUMBERS

T = TypeVar("T")
DETAILS = (("kind",), ("colour", "kind"), ("size", "kind"), ("size", "colour", "kind"))
RELATIONS = {
    "left of": (1, -1), "to the left of": (1, -1), "right of": (1, 1), "to the right of": (1, 1),
    "above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1),
}  # fmt: skip
"""Phrase -> the axis of the place (row 0, column 1) and the sign of the difference."""
RELATED = 0.75
"""Share of captions that relate two things, of those that can."""
FRAMES = (
    "{}",
    "there {be} {}",
    "a picture of {}",
    "a drawing of {}",
    "an image with {}",
    "{} on a plain background",
)
SYNONYMS = ({}, {"small": "little", "large": "big"})
DIRECTIONS = {"to the right": (0, 1), "to the left": (0, -1), "up": (-1, 0), "down": (1, 0)}
BESIDE = {"to the right of": (0, 1), "to the left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
RECOLOUR = ("make {} {}", "change {} to {}", "turn {} {}", "colour {} {}")
REMOVE = ("remove {}", "delete {}", "take away {}", "erase {}")
MOVE = ("move {} {}", "shift {} {}", "push {} {}")
ADD = ("add {} {} {}", "put {} {} {}", "draw {} {} {}")


@dataclass(frozen=True)
class Edit:
    scene: Scene
    instruction: str
    target: Scene


def captions(scene: Scene) -> list[str]:
    """Every wording that describes the scene: ["a ring", "there is a large red ring", ...]."""
    bodies = []
    for detail in DETAILS:
        bodies.append(_listed(scene.objects, detail))
        for a, b in itertools.permutations(_unique(scene, detail), 2):
            bodies += [
                _related(scene, a, phrase, b, detail)
                for phrase in RELATIONS
                if related(a, phrase, b)
            ]
    return list(
        dict.fromkeys(_framed(*choice) for choice in itertools.product(bodies, FRAMES, SYNONYMS))
    )


def draw_caption(scene: Scene, rng: Random) -> str:
    """One of `captions(scene)`: a list or, mostly where it can be, a relation.

    Lists begin at the top. With too few relations, a model reads who is above from who is named
    first.
    """
    detail = choose(DETAILS, rng)
    unique = _unique(scene, detail)
    if len(unique) > 1 and rng.random() < RELATED:
        a = choose(unique, rng)
        b = choose([o for o in unique if o is not a], rng)
        phrase = choose([p for p in RELATIONS if related(a, p, b)], rng)
        body = _related(scene, a, phrase, b, detail)
    else:
        body = _listed(scene.objects, detail)
    return _framed(body, choose(FRAMES, rng), choose(SYNONYMS, rng))


def related(a: Object, phrase: str, b: Object) -> bool:
    """Whether `a` is, say, above `b`: in any row further up, whatever the columns."""
    axis, sign = RELATIONS[phrase]
    return (a.place[axis] - b.place[axis]) * sign > 0


def _related(scene: Scene, a: Object, phrase: str, b: Object, detail: tuple[str, ...]) -> str:
    """`a red circle above a star` and, if there is more, `, with a ring and two crosses`."""
    rest = [o for o in scene.objects if o is not a and o is not b]
    body = f"{counted(name(a, detail), 1)} {phrase} {counted(name(b, detail), 1)}"
    return f"{body}, with {_listed(rest, detail)}" if rest else body


def _listed(objects: Iterable[Object], detail: tuple[str, ...]) -> str:
    """`two red circles, a star and a ring`: like things together, in order of first mention."""
    counts = Counter(name(o, detail) for o in objects)
    *first, last = itertools.starmap(counted, counts.items())
    return f"{', '.join(first)} and {last}" if first else last


@functools.cache
def counted(noun: str, count: int) -> str:
    """`an orange ring`, `three orange rings`."""
    if count == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    *adjectives, kind = noun.split()
    return " ".join([NUMBERS[count], *adjectives, KINDS[kind]])


def name(o: Object, detail: tuple[str, ...]) -> str:
    """`large red circle`, as far as `detail` names its attributes."""
    return _name(o.kind, o.colour, o.size, detail)


@functools.cache
def _name(kind: str, colour: str, size: str, detail: tuple[str, ...]) -> str:
    words = {"kind": kind, "colour": colour, "size": size}
    return " ".join(words[attribute] for attribute in detail)


def _unique(scene: Scene, detail: tuple[str, ...]) -> list[Object]:
    """The objects that are told apart from all others by this much."""
    names = [name(o, detail) for o in scene.objects]
    return [o for o, own in zip(scene.objects, names, strict=True) if names.count(own) == 1]


def _framed(body: str, frame: str, synonyms: dict[str, str]) -> str:
    for word, other in synonyms.items():
        body = body.replace(word, other)
    return frame.format(body, be="is" if body.startswith(("a ", "an ")) else "are")


def draw_edit(scene: Scene, rng: Random) -> Edit | None:
    """An unambiguous edit of the scene; None if the edit that was drawn cannot be done."""
    o = choose(scene.objects, rng)
    details = [detail for detail in DETAILS if o in _unique(scene, detail)]
    if not details:
        return None
    the = f"the {name(o, choose(details, rng))}"
    done = choose((_recolour, _remove, _move, _add), rng)(scene, o, the, rng)
    return done and Edit(scene, *done)


def _recolour(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene]:
    colour = choose([c for c in COLOURS if c != o.colour], rng)
    return choose(RECOLOUR, rng).format(the, colour), scene.without(o).plus(
        replace(o, colour=colour)
    )


def _remove(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    return (choose(REMOVE, rng).format(the), scene.without(o)) if len(scene.objects) > 1 else None


def _move(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    """By one place."""
    direction = choose(tuple(DIRECTIONS), rng)
    place = _free(scene, o, DIRECTIONS[direction])
    return place and (
        choose(MOVE, rng).format(the, direction),
        scene.without(o).plus(replace(o, place=place)),
    )


def _add(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    """A new object on the next place."""
    side = choose(tuple(BESIDE), rng)
    place = _free(scene, o, BESIDE[side])
    if place is None or len(scene.objects) == LARGEST:
        return None
    new = Object(
        choose(tuple(KINDS), rng), choose(tuple(COLOURS), rng), choose(tuple(SIZES), rng), place
    )
    return choose(ADD, rng).format(counted(name(new, DETAILS[-1]), 1), side, the), scene.plus(new)


def _free(scene: Scene, o: Object, step: tuple[int, int]) -> tuple[int, int] | None:
    """The place one step from the object, if it is on the grid and empty."""
    row, column = o.place[0] + step[0], o.place[1] + step[1]
    inside = 0 <= row < GRID and 0 <= column < GRID
    return (row, column) if inside and scene.at((row, column)) is None else None


def choose(options: Sequence[T], rng: Random) -> T:
    """One of them, by `random` alone: Python has changed what `choice` draws between versions."""
    return options[int(rng.random() * len(options))]
