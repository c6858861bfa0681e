"""Scenes drawn, described and edited, each answer judged exactly (after GenEval: Ghosh et al. 2023, arXiv 2310.11513).

GenEval asks a detector for the objects that the prompt names. Here the judge reads the whole picture, and a prompt
is met only if it names all that is there: an object too many is as wrong as one too few.
"""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.sources.scenes.judge import holds, judge, parse, residual
from transfusion_jax.data.sources.scenes.scene import COLOURS, KINDS, LARGEST, SIDES, Scene, render
from transfusion_jax.data.sources.scenes.source import NOVEL_PAIRS, Pair, examples
from transfusion_jax.data.sources.scenes.words import RELATIONS, Edit, choose, counted
from transfusion_jax.figures import ACCENT, INK
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import to_uint8

COUNT = 100
"""Requests of each category."""
SHOWN = 9
RIGHT = "#2f7d55"
SEEN_PAIRS = sorted(set(itertools.product(COLOURS, KINDS)) - NOVEL_PAIRS)


@dataclass(frozen=True)
class Answer:
    """A request, the picture shown for it (None: none came), what to write over that, and whether it is right."""

    image: np.ndarray | None
    title: str
    right: bool


def scenes(engine: Engine, samples: Path, count: int = COUNT) -> dict:
    """Draws, describes and edits scenes; leaves the picture `scenes.png`.

    `geneval_single_object`, `..._two_objects`, `..._counting`, `..._colours`, `..._position` and
    `..._colour_attribution`: shares of `count` prompts met, pairs of colour and kind as in training;
    `geneval_overall`: their mean. `compositional`: the same of pairs that training never showed, half of them alone
    and half beside another. `caption_accuracy`, `compositional_caption_accuracy`: captions that are true of a picture
    of the split. `edit_accuracy`: held-out edits carried out and nothing else changed. `drawing_residual`: mean
    distance of all drawings from what the judge saw in them. `judge_accuracy`: clean held-out pictures read exactly.

    Raises:
      ValueError: the model's images are no scenes.
    """
    if engine.picture_shape not in [(side, side, 3) for side in SIDES]:
        raise ValueError(
            f"scenes are pictures of 32x32x3 or 64x64x3, the model's are {engine.picture_shape}"
        )
    answers = {name: draw(engine, prompts(name, count), seed) for seed, name in enumerate(PROMPTS)}
    drawn = [a.image for group in answers.values() for a in group if a.image is not None]
    reader = engine.using(temperature=0.0)
    answers["caption"] = describe(reader, "held_out", count)
    answers["compositional_caption"] = describe(reader, "compositional", count)
    answers["edit"] = edit(engine, count, seed=len(PROMPTS))
    figure(answers, samples / "scenes.png")
    shares = {name: float(np.mean([a.right for a in group])) for name, group in answers.items()}
    geneval = {f"geneval_{name}": shares[name] for name in PROMPTS if name != "compositional"}
    return {
        **geneval,
        "geneval_overall": float(np.mean(list(geneval.values()))),
        "compositional": shares["compositional"],
        **{
            f"{name}_accuracy": shares[name]
            for name in ("caption", "compositional_caption", "edit")
        },
        "drawing_residual": float(np.mean([residual(image) for image in drawn])) if drawn else None,
        "judge_accuracy": judge_accuracy(engine.picture_shape[0], count),
    }


def prompts(category: str, count: int) -> list[str]:
    """The first `count` prompts of one of `PROMPTS`."""
    rng = Random(f"prompts {category}")
    return [PROMPTS[category](rng, number) for number in range(count)]


def draw(engine: Engine, asked: Sequence[str], seed: int) -> list[Answer]:
    """Draws every prompt; the first span must be a picture."""
    images = [
        _first_image(spans) for spans in engine.generate([(prompt,) for prompt in asked], seed)
    ]
    return [
        Answer(image, prompt, _meets(image, prompt))
        for image, prompt in zip(images, asked, strict=True)
    ]


def describe(engine: Engine, split: str, count: int) -> list[Answer]:
    """Writes a caption, and nothing else, for each of the first pictures of a split."""
    truth = [pair.scene for pair in examples(split, Pair, count)]
    images = [render(scene, engine.picture_shape[0]) for scene in truth]
    spans = engine.generate([(image,) for image in images])
    captions = [s[0].strip() if len(s) == 1 and isinstance(s[0], str) else "" for s in spans]
    return [
        Answer(image, caption or "(no caption)", _true(caption, scene))
        for image, caption, scene in zip(images, captions, truth, strict=True)
    ]


def edit(engine: Engine, count: int, seed: int) -> list[Answer]:
    """Edits the pictures of the first held-out edits; shown are the picture before and the one after."""
    edits, side = examples("held_out", Edit, count), engine.picture_shape[0]
    before = [render(e.scene, side) for e in edits]
    requests = [(image, e.instruction) for image, e in zip(before, edits, strict=True)]
    after = [_first_image(spans) for spans in engine.generate(requests, seed)]
    line = np.full((side, max(side // 32, 1), 3), -1, np.float32)
    return [
        Answer(
            np.concatenate([old, line, np.ones_like(old) if new is None else new], axis=1),
            e.instruction,
            new is not None and judge(new) == e.target,
        )
        for e, old, new in zip(edits, before, after, strict=True)
    ]


def judge_accuracy(side: int, count: int) -> float:
    """Share of clean held-out pictures that the judge reads exactly."""
    return float(
        np.mean(
            [judge(render(p.scene, side)) == p.scene for p in examples("held_out", Pair, count)]
        )
    )


def _first_image(spans: list) -> np.ndarray | None:
    return spans[0] if spans and isinstance(spans[0], np.ndarray) else None


def _meets(image: np.ndarray | None, prompt: str) -> bool:
    return image is not None and _true(prompt, judge(image))


def _true(caption: str, scene: Scene) -> bool:
    claim = parse(caption)
    return claim is not None and holds(claim, scene)


# Prompts


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


# Figure


def figure(answers: dict[str, list[Answer]], path: Path) -> None:
    """A row of pictures for every category, framed by whether they are right."""
    picture = plt.figure(figsize=(13, 1.6 * len(answers)), layout="constrained")
    for (name, group), row in zip(
        answers.items(), picture.subplots(len(answers), SHOWN), strict=True
    ):
        for axes, answer in itertools.zip_longest(row, group[:SHOWN]):
            axes.set(xticks=[], yticks=[])
            colour = INK if answer is None else RIGHT if answer.right else ACCENT
            for spine in axes.spines.values():
                spine.set(visible=answer is not None, color=colour, linewidth=2)
            if answer is not None:
                axes.set_title(_printable(answer.title), fontsize=6, color=INK, parse_math=False)
                axes.imshow(
                    to_uint8(np.zeros((8, 8, 3)) + 1 if answer.image is None else answer.image)
                )
        share = np.mean([a.right for a in group])
        label = f"{name.replace('_', ' ')}\n{share:.0%}".replace(" caption", "\ncaption").replace(
            "colour ", "colour\n"
        )
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    picture.savefig(path, dpi=150)
    plt.close(picture)


def _printable(title: str) -> str:
    """In lines, without what no font has: a model that has learned little writes any bytes."""
    return textwrap.fill(
        "".join(c if c.isascii() and c.isprintable() else "?" for c in title[:150]), 30
    )
