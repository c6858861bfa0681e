"""The judge of scenes: what a picture shows, what a caption claims, whether a claim is true."""

import functools
import itertools
import re
from dataclasses import dataclass

import numpy as np

from transfusion_jax.data.sources.scenes.scene import (
    BACKGROUND,
    COLOURS,
    GRID,
    KINDS,
    LARGEST,
    SIDES,
    SIZES,
    Object,
    Scene,
    colour_values,
    coverage,
    render,
    window,
)
from transfusion_jax.data.sources.scenes.words import FRAMES, RELATIONS, SYNONYMS, related
from transfusion_jax.data.sources.sums import NUMBERS

PLACES = tuple(itertools.product(range(GRID), repeat=2))
SIDE = min(SIDES)
"""The side at which pictures are judged; larger ones are averaged down to it."""
BLURS = (0.0, 0.8, 1.3)
"""Standard deviations, in pixels, of the Gaussian blurs under which an object is still known."""
SHIFTS = tuple(itertools.product((-1, 0, 1), repeat=2))
"""Pixels by which it may be out of place."""
EVIDENCE = 4.0
"""By how much, as a sum of squares, an object must explain a place better than the background does.
The faintest object explains 17."""


def judge(image_hwc: np.ndarray) -> Scene:
    """The scene that a picture [side, side, 3] shows, averaged to `SIDE` and clipped to [-1, 1].

    Each place holds the object whose picture is nearest in square distance (the likeliest under
    Gaussian noise), if that is `EVIDENCE` nearer than the background. The scene may have no object,
    or more than any in the data set.
    """
    scale = image_hwc.shape[0] // SIDE
    image_hwc = np.clip(image_hwc.reshape(SIDE, scale, SIDE, scale, 3).mean((1, 3)), -1, 1).astype(
        np.float32
    )
    seen_PNc = np.stack(
        [image_hwc[window(place, SIDE)].reshape(-1, 3) for place in PLACES]
    ) - colour_values(BACKGROUND)
    things, mask_MN = _masks()
    paint_Cc = np.stack([colour_values(rgb) for rgb in COLOURS.values()]) - colour_values(
        BACKGROUND
    )
    # |seen|^2 - |seen - mask paint|^2
    match_PMC = (mask_MN @ seen_PNc) @ paint_Cc.T
    gain_PMC = 2 * match_PMC - ((mask_MN**2).sum(1)[:, None] * (paint_Cc**2).sum(1)[None, :])[None]
    objects = []
    for place, gain_MC in zip(PLACES, gain_PMC, strict=True):
        mask, colour = np.unravel_index(gain_MC.argmax(), gain_MC.shape)
        if gain_MC[mask, colour] > EVIDENCE:
            kind, size = things[mask]
            objects.append(Object(kind, tuple(COLOURS)[colour], size, place))
    return Scene(tuple(objects))


def residual(image_hwc: np.ndarray) -> float:
    """Root mean square of a picture less what the judge sees in it; values range over [-1, 1]."""
    image_hwc = np.clip(image_hwc, -1, 1)
    return float(np.sqrt(np.mean((image_hwc - render(judge(image_hwc), len(image_hwc))) ** 2)))


@functools.cache
def _masks() -> tuple[list[tuple[str, str]], np.ndarray]:
    """(kind, size), and how such an object can cover the pixels of its place [M, N]."""
    things, masks = [], []
    for thing, blur in itertools.product(itertools.product(KINDS, SIZES), BLURS):
        alone_hw = np.zeros((SIDE, SIDE), np.float32)
        alone_hw[window((1, 1), SIDE)] = coverage(*thing, SIDE)
        things += [thing] * len(SHIFTS)
        masks += [
            np.roll(_blurred(alone_hw, blur), shift, (0, 1))[window((1, 1), SIDE)].ravel()
            for shift in SHIFTS
        ]
    return things, np.stack(masks)


def _blurred(mask_hw: np.ndarray, deviation: float) -> np.ndarray:
    if deviation == 0:
        return mask_hw
    at = np.arange(len(mask_hw), dtype=np.float32)
    kernel = np.exp(-0.5 * ((at[:, None] - at[None, :]) / deviation) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ mask_hw @ kernel.T


@dataclass(frozen=True)
class Item:
    """`two small red stars`; what is not said is None."""

    count: int
    size: str | None
    colour: str | None
    kind: str

    def fits(self, o: Object) -> bool:
        return (
            o.kind == self.kind and self.colour in (None, o.colour) and self.size in (None, o.size)
        )


@dataclass(frozen=True)
class Claim:
    """What a caption says: all that there is, and relations (item, phrase, item) of it."""

    items: tuple[Item, ...]
    relations: tuple[tuple[int, str, int], ...]


def parse(caption: str) -> Claim | None:
    """What a caption of the grammar of `scenes.captions` says; None for any other text."""
    body = next((m[1] for frame in _frames() if (m := frame.fullmatch(caption))), "")
    items, relations, linked = [], [], ""
    while match := _noun_phrase().match(body):
        item = _item(*match.groups())
        if item is None:
            return None
        items.append(item)
        if linked in RELATIONS:
            relations.append((len(items) - 2, linked, len(items) - 1))
        body = body[match.end() :]
        if not body:
            return Claim(tuple(items), tuple(relations))
        link = _link().match(body)
        if link is None:
            return None
        linked, body = link[1], body[link.end() :]
    return None


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the claim names each object of the scene exactly once, with true relations."""
    slots = [number for number, item in enumerate(claim.items) for _ in range(item.count)]
    return len(slots) == len(scene.objects) and any(
        _holds(claim, slots, objects) for objects in itertools.permutations(scene.objects)
    )


def _holds(claim: Claim, slots: list[int], objects: tuple[Object, ...]) -> bool:
    named = list(zip(slots, objects, strict=True))
    return all(claim.items[slot].fits(o) for slot, o in named) and all(
        related(a, phrase, b)
        for one, phrase, other in claim.relations
        for (i, a), (j, b) in itertools.product(named, named)
        if (i, j) == (one, other)
    )


def _item(number: str, size: str | None, colour: str | None, noun: str) -> Item | None:
    count = 1 if number in ("a", "an") else NUMBERS.index(number)
    kind = noun if count == 1 else {plural: kind for kind, plural in KINDS.items()}.get(noun)
    size = {other: word for words in SYNONYMS for word, other in words.items()}.get(size, size)
    return Item(count, size, colour, kind) if kind in KINDS else None


@functools.cache
def _frames() -> list[re.Pattern]:
    """The frames as patterns of a caption, the bare one last."""
    longest_first = sorted(FRAMES, key=len, reverse=True)
    return [re.compile(frame.format("(.+)", be="(?:is|are)")) for frame in longest_first]


@functools.cache
def _noun_phrase() -> re.Pattern:
    sizes = [*SIZES, *(other for words in SYNONYMS for other in words.values())]
    nouns = [*KINDS.values(), *KINDS]
    number, size, colour, noun = (
        "|".join(words) for words in (NUMBERS[1 : LARGEST + 1], sizes, COLOURS, nouns)
    )
    return re.compile(rf"(an?|{number}) (?:({size}) )?(?:({colour}) )?({noun})\b")


@functools.cache
def _link() -> re.Pattern:
    """What joins two noun phrases."""
    return re.compile(rf"(?:,? (and|with|{'|'.join(RELATIONS)})|,) ")
