"""A scene, all that there is to see in it, and its picture."""

import functools
from dataclasses import dataclass

import numpy as np

GRID = 3
"""Places along a side."""
LARGEST = 4
"""Objects of a scene, at most."""
SIDES = (32, 64)
"""Sizes of pictures, in pixels."""
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
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "ring": "rings",
    "cross": "crosses",
}
"""Singular and plural."""
SIZES = {"small": 0.56, "large": 0.94}
"""Outer radius, in half places."""


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
    """How much of each pixel of a place an object covers, float32 [w, w], from 8 x 8 samples."""
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
    return (
        np.hypot(x, y + 0.04) * (notch.imag * np.cos(angle) + (1 - notch.real) * np.sin(angle))
        <= 1.04 * notch.imag
    )
