"""Scenes: one to four coloured shapes on a 3 x 3 grid, with captions and edits of known truth.

A `Scene` says all that there is to see, so a picture is right when it reads back as the scene that
was asked for (`judge.py`). Document i of a split is a function of (split, i) alone, and a split has
as many documents as are asked for. No scene of "train" is in "held_out". "compositional" scenes
show at least one of `NOVEL_PAIRS`, which the other two never show, though they show every colour
and every kind.
"""

import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import (
    Document,
    Image,
    Text,
    interleaved_document,
    pair_document,
    pair_length,
)
from transfusion_jax.data.sources.scenes.scene import (
    COLOURS,
    GRID,
    KINDS,
    LARGEST,
    SIDES,
    SIZES,
    Object,
    Scene,
    render,
)
from transfusion_jax.data.sources.scenes.words import Edit, choose, draw_caption, draw_edit
from transfusion_jax.data.sources.source import Assets
from transfusion_jax.data.tokenizer import Tokenizer

COUNTS = {"train": 50_000, "held_out": 1_000, "compositional": 1_000}
EDIT_SHARE = 0.15
"""Share of the documents of `scenes` that are edits; the others are pairs."""
CAPTIONS = 4
"""Wordings that a pair has, drawn from all that are true of it."""
HELD_OUT = 10
"""One in so many scenes is kept from training."""
NOVEL_PAIRS = frozenset(
    {
        ("red", "triangle"),
        ("orange", "square"),
        ("yellow", "ring"),
        ("green", "star"),
        ("cyan", "cross"),
        ("blue", "circle"),
        ("purple", "square"),
        ("black", "ring"),
    }
)
"""(colour, kind) that only compositional scenes show."""


@dataclass(frozen=True)
class Pair:
    scene: Scene
    captions: tuple[str, ...]


@functools.cache  # to draw one takes longer than all else that is done for it; 54 MiB for "train"
def example(split: str, index: int, edit_share: float = EDIT_SHARE) -> Pair | Edit:
    """Document `index` of a split; both scenes of an edit belong to the split.

    Raises:
      ValueError: the split is not one of `COUNTS`.
    """
    _check(split)
    rng = Random(f"{split} {index}")
    is_edit = rng.random() < edit_share
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
    """Pictures, float32 [n, side, side, 3] in [-1, 1], of these documents; of edits, the first."""
    return np.stack([render(example(split, int(index)).scene, side) for index in indices])


def _check(split: str) -> None:
    if split not in COUNTS:
        raise ValueError(f"split {split!r} of the scenes is not one of {sorted(COUNTS)}")


def _draw(rng: Random) -> Scene:
    """One to four objects; of one kind in a third of scenes, and of one colour in half of those."""
    count = 1 + int(rng.random() * LARGEST)
    places = sorted(range(GRID * GRID), key=lambda _: rng.random())[:count]
    alike = rng.random()
    kind = choose(tuple(KINDS), rng) if alike < 1 / 3 else None
    colour = choose(tuple(COLOURS), rng) if alike < 1 / 6 else None
    return Scene(
        tuple(
            Object(
                kind or choose(tuple(KINDS), rng),
                colour or choose(tuple(COLOURS), rng),
                choose(tuple(SIZES), rng),
                divmod(place, GRID),
            )
            for place in places
        )
    )


def _belongs(scene: Scene, split: str) -> bool:
    if any((o.colour, o.kind) in NOVEL_PAIRS for o in scene.objects):
        return split == "compositional"
    key = " ".join(f"{o.kind} {o.colour} {o.size} {o.place}" for o in scene.objects)
    return split == ("train" if zlib.crc32(key.encode()) % HELD_OUT else "held_out")


class Scenes:
    """Pairs of picture and caption, and edits: a picture, an instruction, the picture after it.

    The source `scene_edits` has `edit_share` 1: edits alone.

    Raises:
      ValueError: the experiment's images are not RGB of 32 x 32 or 64 x 64, or there is no such
        split.
    """

    assets = Assets()
    splittable = False

    def __init__(self, experiment: Experiment, split: str, edit_share: float = EDIT_SHARE):
        if experiment.image.shape not in [(side, side, 3) for side in SIDES]:
            raise ValueError(
                f"scenes are pictures of 32x32x3 or 64x64x3, image says {experiment.image.shape}"
            )
        _check(split)
        self.experiment, self.split, self.count = experiment, split, COUNTS[split]
        self.edit_share = edit_share

    def texts(self) -> Iterator[str]:
        return itertools.chain.from_iterable(map(_texts, self._examples()))

    def lengths(self, tokenizer: Tokenizer) -> np.ndarray:
        ids, span = functools.cache(tokenizer.encode), self.experiment.image.span
        longest = [
            (isinstance(e, Edit), pair_length([ids(text) for text in _texts(e)], span))
            for e in self._examples()
        ]
        return np.asarray([length + span * is_edit for is_edit, length in longest])

    def documents(
        self, indices: Sequence[int], tokenizer: Tokenizer, rng: np.random.Generator
    ) -> list[Document]:
        return [self._document(index, tokenizer, rng) for index in indices]

    def _document(self, index: int, tokenizer: Tokenizer, rng: np.random.Generator) -> Document:
        """A `pair_document`, or an edit.

        The latter is `<s> BOI a EOI make it red BOI b EOI </s>`, an `interleaved_document`. In a
        share of `data.image_first` it is `<s> BOI a EOI BOI b EOI make it red </s>`, unless the
        source is of edits alone.
        """
        found = example(self.split, index, self.edit_share)
        side, data = self.experiment.image.height, self.experiment.data
        settings = tokenizer, data, self.experiment.diffusion, rng
        ids = [tokenizer.encode(text) for text in _texts(found)]
        before = render(found.scene, side)
        if isinstance(found, Pair):
            return pair_document(ids, before, *settings)
        instruction, after = Text(ids[0]), render(found.target, side)
        # Were edits all there is, a picture would mostly be followed by another, not by a caption.
        if self.edit_share == 1 or rng.random() >= data.image_first:
            return interleaved_document([before, instruction, after], *settings)
        bos, eos = [tokenizer.bos], [tokenizer.eos]
        limit = self.experiment.diffusion.context_limit
        images = [Image(x, limit) for x in (before, after)]
        return Document((Text(bos), *images, Text([*ids[0], *eos])))

    def _examples(self) -> Iterator[Pair | Edit]:
        return (example(self.split, index, self.edit_share) for index in range(self.count))


def _texts(found: Pair | Edit) -> Sequence[str]:
    return found.captions if isinstance(found, Pair) else (found.instruction,)
