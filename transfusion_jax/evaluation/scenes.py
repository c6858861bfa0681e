"""Suite `scenes`: scenes drawn, described and edited, each answer judged exactly.

After GenEval (Ghosh et al. 2023, arXiv 2310.11513), which asks a detector for the objects that the
prompt names. Here the judge reads the whole picture, and a prompt is met only if it names all that
the picture shows: an object too many is as wrong as one too few.
"""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.sources.scenes.judge import holds, judge, parse, residual
from transfusion_jax.data.sources.scenes.scene import Scene, render
from transfusion_jax.data.sources.scenes.source import Pair, examples, pictures
from transfusion_jax.data.sources.scenes.words import Edit, counted
from transfusion_jax.evaluation.answers import only_picture, only_text
from transfusion_jax.evaluation.scene_prompts import PROMPTS, prompts
from transfusion_jax.evaluation.variety import Pictures, variety
from transfusion_jax.figures import ACCENT, INK, RIGHT, frame, save, show
from transfusion_jax.generation.engine import Engine

COUNT = 100
"""Requests of each category."""
SHOWN = 9
HELD_OUT = 1000
"""Held-out documents whose pictures drawn ones are compared with."""
TRAINING = 10_000
"""Training pictures that drawn ones are compared with."""


@dataclass(frozen=True)
class Answer:
    """A request: the picture to show (None: none came), its title, and whether it was met."""

    image: np.ndarray | None
    title: str
    right: bool


def scenes(engine: Engine, samples: Path, rows: int | None, count: int = COUNT) -> dict:
    """Draws, describes and edits scenes; leaves the picture `scenes.png`.

    Drawings and edits begin with an image: a short caption could go on, and whether it does is not
    judged here.

    `geneval_single_object`, `..._two_objects`, `..._counting`, `..._colours`, `..._position` and
    `..._colour_attribution`: shares of `count` prompts met, pairs of colour and kind as in
    training; `geneval_overall`: their mean. `compositional`: the same of pairs that training never
    showed, half of them alone and half beside another. `caption_accuracy`,
    `compositional_caption_accuracy`: captions that are true of a picture of the split.
    `edit_accuracy`: held-out edits carried out and nothing else changed. `drawing_residual`: mean
    distance of all drawings from what the judge saw in them. `judge_accuracy`: clean held-out
    pictures read exactly. And the `variety` of the drawings: their spread for single objects, a
    class for each kind, their distance from the first `TRAINING` pictures for all prompts.
    """
    side = engine.picture_shape[0]
    drawn = {name: draw(engine, prompts(name, count), seed) for seed, name in enumerate(PROMPTS)}
    reader = engine.using(temperature=0.0)
    answers = {
        **drawn,
        "caption": describe(reader, "held_out", count),
        "compositional_caption": describe(reader, "compositional", count),
        "edit": edit(engine, count, seed=len(PROMPTS)),
    }
    scenes_grid(answers, samples / "scenes.png")
    shares = {name: float(np.mean([a.right for a in group])) for name, group in answers.items()}
    geneval = {f"geneval_{name}": shares[name] for name in PROMPTS if name != "compositional"}
    images = [a.image for group in drawn.values() for a in group if a.image is not None]
    return {
        **geneval,
        "geneval_overall": float(np.mean(list(geneval.values()))),
        "compositional": shares["compositional"],
        "caption_accuracy": shares["caption"],
        "compositional_caption_accuracy": shares["compositional_caption"],
        "edit_accuracy": shares["edit"],
        "drawing_residual": float(np.mean([residual(x) for x in images])) if images else None,
        "judge_accuracy": judge_accuracy(side, count),
        **drawn_variety(drawn, side),
    }


def drawn_variety(drawn: dict[str, list[Answer]], side: int) -> dict:
    """The `variety` of drawings, a class for each prompt of a single object.

    Every other drawing is in a class of its own, which does not count for the spread.
    """
    answers = [answer for group in drawn.values() for answer in group]
    single = {answer.title for answer in drawn["single_object"]}
    classes = [a.title if a.title in single else str(i) for i, a in enumerate(answers)]
    images = [None if a.image is None else np.clip(a.image, -1, 1) for a in answers]
    real = [pair.scene for pair in examples("held_out", Pair, HELD_OUT)]
    alone = [counted(s.objects[0].kind, 1) if len(s.objects) == 1 else "" for s in real]
    return variety(
        Pictures(images, classes),
        Pictures(
            [render(scene, side) for scene in real],
            [name or str(number) for number, name in enumerate(alone)],
        ),
        pictures("train", range(TRAINING), side),
    )


def draw(engine: Engine, asked: Sequence[str], seed: int) -> list[Answer]:
    """Draws every prompt; the answer must be one picture."""
    spans = engine.generate([(prompt,) for prompt in asked], seed, draw=True)
    images = [only_picture(answer) for answer in spans]
    return [
        Answer(image, prompt, image is not None and _true(prompt, judge(image)))
        for image, prompt in zip(images, asked, strict=True)
    ]


def describe(engine: Engine, split: str, count: int) -> list[Answer]:
    """Writes a caption, and nothing else, for each of the first pictures of a split."""
    truth = [pair.scene for pair in examples(split, Pair, count)]
    images = [render(scene, engine.picture_shape[0]) for scene in truth]
    spans = engine.generate([(image,) for image in images])
    captions = [only_text(answer).strip() for answer in spans]
    return [
        Answer(image, caption or "(no caption)", _true(caption, scene))
        for image, caption, scene in zip(images, captions, truth, strict=True)
    ]


def edit(engine: Engine, count: int, seed: int) -> list[Answer]:
    """Carries out the first held-out edits; shown are the pictures before and after."""
    edits, side = examples("held_out", Edit, count), engine.picture_shape[0]
    before = [render(e.scene, side) for e in edits]
    requests = [(image, e.instruction) for image, e in zip(before, edits, strict=True)]
    after = [only_picture(spans) for spans in engine.generate(requests, seed, draw=True)]
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
    truth = [pair.scene for pair in examples("held_out", Pair, count)]
    return float(np.mean([judge(render(scene, side)) == scene for scene in truth]))


def _true(caption: str, scene: Scene) -> bool:
    claim = parse(caption)
    return claim is not None and holds(claim, scene)


def scenes_grid(answers: dict[str, list[Answer]], path: Path) -> None:
    """A row of pictures for every category, framed by whether they are right."""
    figure = plt.figure(figsize=(13, 1.6 * len(answers)), layout="constrained")
    grid = figure.subplots(len(answers), SHOWN)
    for (name, group), row in zip(answers.items(), grid, strict=True):
        for axes, answer in itertools.zip_longest(row, group[:SHOWN]):
            _show(axes, answer)
        share = np.mean([a.right for a in group])
        label = f"{name.replace('_', ' ')}\n{share:.0%}"
        label = label.replace(" caption", "\ncaption").replace("colour ", "colour\n")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    save(figure, path, 150)


def _show(axes: plt.Axes, answer: Answer | None) -> None:
    if answer is None:
        axes.set(xticks=[], yticks=[])
        frame(axes, None)
        return
    show(axes, np.ones((8, 8, 3)) if answer.image is None else answer.image)
    frame(axes, RIGHT if answer.right else ACCENT)
    axes.set_title(_printable(answer.title), fontsize=6, color=INK, parse_math=False)


def _printable(title: str) -> str:
    """In lines, without what no font has: a model that has learned little writes any bytes."""
    ascii_only = "".join(c if c.isascii() and c.isprintable() else "?" for c in title[:150])
    return textwrap.fill(ascii_only, 30)
