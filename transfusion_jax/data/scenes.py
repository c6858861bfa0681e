"""Scenes: one to four coloured shapes on a grid of nine places, with captions and edits whose truth is known.

A `Scene` says all that there is to see, so a picture is right when it reads back as the scene that was asked for
(`scenes_judge.py`). Document i of a split is a function of (split, i) alone, and a split has as many documents as
are asked for. No scene of "train" is in "held_out"; "compositional" scenes show at least one of `NOVEL_PAIRS`, and
those are in no scene of the other two, as every colour and every kind is.
"""

import functools
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, Image, Text, pair_document, pair_length
from transfusion_jax.data.sums import NUMBERS
from transfusion_jax.data.tokenizer import Tokenizer

T = TypeVar("T")

COUNTS = {"train": 50_000, "held_out": 1_000, "compositional": 1_000}
EDIT_SHARE = 0.15
"""Share of the documents that are edits; the others are pairs."""
CAPTIONS = 4
"""Wordings that a pair has, drawn from all that are true of it."""
HELD_OUT = 10
"""One in so many scenes is kept from training."""

GRID, LARGEST = 3, 4
SIDES = (32, 64)
BACKGROUND = (244, 243, 239)
COLOURS = {
    "red": (214, 28, 44),
    "orange": (247, 126, 10),
    "yellow": (252, 222, 40),
    "green": (22, 150, 62),
    "cyan": (60, 202, 226),
    "blue": (32, 72, 208),
    "purple": (140, 44, 172),
    "black": (28, 28, 34),
}
KINDS = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "ring": "rings",
    "cross": "crosses",
}  # fmt: skip
"""Singular and plural."""
SIZES = {"small": 0.56, "large": 0.94}
"""Outer radius, in half places."""
NOVEL_PAIRS = frozenset({
    ("red", "triangle"), ("orange", "square"), ("yellow", "ring"), ("green", "star"), ("cyan", "cross"),
    ("blue", "circle"), ("purple", "square"), ("black", "ring"),
})  # fmt: skip
"""(colour, kind) that only compositional scenes show."""

DETAILS = (("kind",), ("colour", "kind"), ("size", "kind"), ("size", "colour", "kind"))
RELATIONS = {
    "left of": (1, -1), "to the left of": (1, -1), "right of": (1, 1), "to the right of": (1, 1),
    "above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1),
}  # fmt: skip
"""Phrase -> the axis of the place (row 0, column 1) and the sign of the difference."""
FRAMES = (
    "{}", "there {be} {}", "a picture of {}", "a drawing of {}", "an image with {}", "{} on a plain background",
)  # fmt: skip
SYNONYMS = ({}, {"small": "little", "large": "big"})

DIRECTIONS = {"to the right": (0, 1), "to the left": (0, -1), "up": (-1, 0), "down": (1, 0)}
BESIDE = {"to the right of": (0, 1), "to the left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
RECOLOUR = ("make {} {}", "change {} to {}", "turn {} {}", "colour {} {}")
REMOVE = ("remove {}", "delete {}", "take away {}", "erase {}")
MOVE = ("move {} {}", "shift {} {}", "push {} {}")
ADD = ("add {} {} {}", "put {} {} {}", "draw {} {} {}")


@dataclass(frozen=True)
class Object:
    kind: str
    colour: str
    size: str
    place: tuple[int, int]
    """Row and column on the grid, from the top left."""


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, whatever order they are given in; each has a place of its own."""

    objects: tuple[Object, ...]

    def __post_init__(self):
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda o: o.place)))
        assert len({o.place for o in self.objects}) == len(self.objects)

    def at(self, place: tuple[int, int]) -> Object | None:
        return next((o for o in self.objects if o.place == place), None)

    def without(self, thing: Object) -> "Scene":
        return Scene(tuple(o for o in self.objects if o != thing))

    def plus(self, thing: Object) -> "Scene":
        return Scene((*self.objects, thing))


@dataclass(frozen=True)
class Pair:
    scene: Scene
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    scene: Scene
    instruction: str
    target: Scene


# Pictures


def render(scene: Scene, side: int) -> np.ndarray:
    """The picture, float32 [side, side, 3] in [-1, 1]; `side` is a multiple of 32."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = colour_values(BACKGROUND)
    for o in scene.objects:
        picture[window(o.place, side)] = _stamp(o.kind, o.colour, o.size, side)
    return picture


def window(place: tuple[int, int], side: int) -> tuple[slice, slice]:
    """Where a place is in a picture: squares of 10/32 of its side, inside a border of 1/32."""
    width, border = 10 * side // 32, side // 32
    top, left = (border + width * i for i in place)
    return slice(top, top + width), slice(left, left + width)


@functools.cache
def _stamp(kind: str, colour: str, size: str, side: int) -> np.ndarray:
    """One object on the background as it fills its place, float32 [w, w, 3]."""
    alpha = coverage(kind, size, side)[..., None]
    return alpha * colour_values(COLOURS[colour]) + (1 - alpha) * colour_values(BACKGROUND)


def coverage(kind: str, size: str, side: int) -> np.ndarray:
    """The share of each pixel of a place that an object covers, float32 [w, w], from 8 x 8 samples."""
    width, samples = 10 * side // 32, 8
    at = ((np.arange(width * samples) + 0.5) / (width * samples) * 2 - 1) / SIZES[size]
    inside = _inside(kind, at[None, :], at[:, None]).reshape(width, samples, width, samples)
    return inside.mean((1, 3), dtype=np.float32)


def colour_values(colour: tuple[int, int, int]) -> np.ndarray:
    """0 ... 255 to [-1, 1]."""
    return np.asarray(colour, np.float32) / 127.5 - 1


def _inside(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape of outer radius 1 about the origin, y downwards."""
    radius = np.hypot(x, y)
    if kind == "circle":
        return radius <= 1
    if kind == "ring":
        return (radius <= 1) & (radius >= 0.54)
    if kind == "square":
        return np.maximum(abs(x), abs(y)) <= 0.87
    if kind == "triangle":
        return (y <= 0.82) & (abs(x) <= (y + 0.98) * 0.55)
    if kind == "cross":
        return (np.maximum(abs(x), abs(y)) <= 0.98) & (np.minimum(abs(x), abs(y)) <= 0.3)
    assert kind == "star"
    # Ten equal sectors, each bounded by the line from a tip (radius 1) to a notch (radius 0.42).
    angle = abs((np.arctan2(x, -y - 0.04) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.42 * np.exp(1j * np.pi / 5)
    return np.hypot(x, y + 0.04) * (notch.imag * np.cos(angle) + (1 - notch.real) * np.sin(angle)) <= 1.04 * notch.imag


# Captions: each names every object, and nothing else.


def captions(scene: Scene) -> list[str]:
    """Every wording that describes the scene: ["a ring", "there is a large red ring", ...]."""
    bodies = []
    for detail in DETAILS:
        bodies.append(_listed(scene.objects, detail))
        for a, b in itertools.permutations(_unique(scene, detail), 2):
            bodies += [_related(scene, a, phrase, b, detail) for phrase in RELATIONS if related(a, phrase, b)]
    return list(dict.fromkeys(_framed(*choice) for choice in itertools.product(bodies, FRAMES, SYNONYMS)))


def draw_caption(scene: Scene, rng: Random) -> str:
    """One of `captions(scene)`: a list or, half of the time where it can be, a relation."""
    detail = choose(DETAILS, rng)
    unique = _unique(scene, detail)
    if len(unique) > 1 and rng.random() < 0.5:
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
    """`two red circles, a star and a ring`: alike things together, in the order of the first of them."""
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


# Edits


def draw_edit(scene: Scene, rng: Random) -> Edit | None:
    """An edit of the scene that says exactly one thing; None if what was drawn cannot be done to it."""
    o = choose(scene.objects, rng)
    details = [detail for detail in DETAILS if o in _unique(scene, detail)]
    if not details:
        return None
    the = f"the {name(o, choose(details, rng))}"
    done = choose((_recolour, _remove, _move, _add), rng)(scene, o, the, rng)
    return done and Edit(scene, *done)


def _recolour(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene]:
    colour = choose([c for c in COLOURS if c != o.colour], rng)
    return choose(RECOLOUR, rng).format(the, colour), scene.without(o).plus(replace(o, colour=colour))


def _remove(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    return (choose(REMOVE, rng).format(the), scene.without(o)) if len(scene.objects) > 1 else None


def _move(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    """By one place."""
    direction = choose(tuple(DIRECTIONS), rng)
    place = _free(scene, o, DIRECTIONS[direction])
    return place and (choose(MOVE, rng).format(the, direction), scene.without(o).plus(replace(o, place=place)))


def _add(scene: Scene, o: Object, the: str, rng: Random) -> tuple[str, Scene] | None:
    """A new object on the next place."""
    side = choose(tuple(BESIDE), rng)
    place = _free(scene, o, BESIDE[side])
    if place is None or len(scene.objects) == LARGEST:
        return None
    new = Object(choose(tuple(KINDS), rng), choose(tuple(COLOURS), rng), choose(tuple(SIZES), rng), place)
    return choose(ADD, rng).format(counted(name(new, DETAILS[-1]), 1), side, the), scene.plus(new)


def _free(scene: Scene, o: Object, step: tuple[int, int]) -> tuple[int, int] | None:
    """The place one step from the object, if it is on the grid and empty."""
    row, column = o.place[0] + step[0], o.place[1] + step[1]
    inside = 0 <= row < GRID and 0 <= column < GRID
    return (row, column) if inside and scene.at((row, column)) is None else None


# Splits


def example(split: str, index: int) -> Pair | Edit:
    """Document `index` of a split; every scene in it, an edit's target as well, belongs to the split.

    Raises:
      ValueError: the split is not one of `COUNTS`.
    """
    _check(split)
    rng = Random(f"{split} {index}")
    is_edit = rng.random() < EDIT_SHARE
    while True:
        scene = _draw(rng)
        if not _belongs(scene, split):
            continue
        if not is_edit:
            return Pair(scene, tuple(draw_caption(scene, rng) for _ in range(CAPTIONS)))
        edit = draw_edit(scene, rng)
        if edit and _belongs(edit.target, split):
            return edit


def examples(split: str, kind: type, count: int) -> list:
    """The first `count` documents of a split that are of one kind, `Pair` or `Edit`."""
    every = (example(split, index) for index in itertools.count())
    return list(itertools.islice((e for e in every if isinstance(e, kind)), count))


def pictures(split: str, indices: Iterable[int], side: int) -> np.ndarray:
    """Pictures of these documents, float32 [n, side, side, 3] in [-1, 1]; of an edit, the one before it."""
    return np.stack([render(example(split, int(index)).scene, side) for index in indices])


def _check(split: str) -> None:
    if split not in COUNTS:
        raise ValueError(f"split {split!r} of the scenes is not one of {sorted(COUNTS)}")


def _draw(rng: Random) -> Scene:
    """One to four objects, all of one kind in a third of the scenes, and also of one colour in half of those."""
    count = 1 + int(rng.random() * LARGEST)
    places = sorted(range(GRID * GRID), key=lambda _: rng.random())[:count]
    alike = rng.random()
    kind = choose(tuple(KINDS), rng) if alike < 1 / 3 else None
    colour = choose(tuple(COLOURS), rng) if alike < 1 / 6 else None
    return Scene(tuple(
        Object(
            kind or choose(tuple(KINDS), rng), colour or choose(tuple(COLOURS), rng), choose(tuple(SIZES), rng),
            divmod(place, GRID),
        )
        for place in places
    ))  # fmt: skip


def _belongs(scene: Scene, split: str) -> bool:
    if any((o.colour, o.kind) in NOVEL_PAIRS for o in scene.objects):
        return split == "compositional"
    key = " ".join(f"{o.kind} {o.colour} {o.size} {o.place}" for o in scene.objects)
    return split == ("train" if zlib.crc32(key.encode()) % HELD_OUT else "held_out")


def choose(options: Sequence[T], rng: Random) -> T:
    """By `random` alone, whose numbers Python promises to keep; those of `choice` have changed between versions."""
    return options[int(rng.random() * len(options))]


class Scenes:
    """Pairs of a picture and one of its captions, and edits: a picture, an instruction, the picture after it.

    Raises:
      ValueError: the experiment's images are not RGB of 32 x 32 or 64 x 64, or the split does not exist.
    """

    cut = False

    def __init__(self, experiment: Experiment, split: str):
        if experiment.image.shape not in [(side, side, 3) for side in SIDES]:
            raise ValueError(f"scenes are pictures of 32x32x3 or 64x64x3, image says {experiment.image.shape}")
        _check(split)
        self.experiment, self.split, self.count = experiment, split, COUNTS[split]

    def texts(self) -> Iterator[str]:
        return itertools.chain.from_iterable(map(_texts, self._examples()))

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        ids, span = functools.cache(tokenizer.encode), self.experiment.image.span
        longest = [
            (isinstance(e, Edit), pair_length([ids(text) for text in _texts(e)], span)) for e in self._examples()
        ]
        return np.asarray([length + span * is_edit for is_edit, length in longest])

    def document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        """A pair as one of `pair_document`, or `<s> image instruction image </s>`, the first under the noise limit."""
        found, side, diffusion = example(self.split, index), self.experiment.image.height, self.experiment.diffusion
        ids = [tokenizer.encode(text) for text in _texts(found)]
        picture = render(found.scene, side)
        if isinstance(found, Pair):
            return pair_document(ids, picture, tokenizer, self.experiment.data, diffusion, rng)
        before, after = Image(picture, diffusion.noise_limit), Image(render(found.target, side), diffusion.steps)
        return Document((Text([tokenizer.bos]), before, Text(ids[0]), after, Text([tokenizer.eos])))

    def _examples(self) -> Iterator[Pair | Edit]:
        return (example(self.split, index) for index in range(self.count))


def _texts(found: Pair | Edit) -> Sequence[str]:
    return found.captions if isinstance(found, Pair) else (found.instruction,)
