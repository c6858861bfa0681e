"""Suite `digits`: digits drawn and digits read, judged by what the real digits say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.sources.digits import NUMBERS, captions, label_of, load
from transfusion_jax.evaluation.answers import only_picture, only_text
from transfusion_jax.evaluation.variety import Pictures, variety
from transfusion_jax.figures import ACCENT, INK, frame, save, show, wrapped
from transfusion_jax.generation.engine import Engine

if TYPE_CHECKING:
    from sklearn.svm import SVC

SHAPE = (8, 8, 1)
DRAWN = 500
"""Requests to draw."""


@dataclass(frozen=True)
class Drawings:
    """Digits asked for, the pictures that came (None: none), and what the judge saw (-1: none)."""

    labels: np.ndarray
    images: Sequence[np.ndarray | None]
    judged: np.ndarray


@dataclass(frozen=True)
class Readings:
    """Held-out pictures, their digits, and the captions that the model wrote (empty: none)."""

    images: np.ndarray
    labels: np.ndarray
    captions: Sequence[str]


def digits(engine: Engine, samples: Path, rows: int | None) -> dict:
    """Draws and reads digits; leaves the picture `digits.png`.

    `generation_accuracy`: drawn digits that the judge takes for what was asked, of all requests.
    `classifier_accuracy`: the judge's own on real held-out digits. `caption_accuracy`: captions of
    held-out pictures that are one of the right wordings, to the letter. And the `variety` of the
    drawings, a class for each digit.
    """
    classifier, classifier_accuracy = judge()
    drawings = draw(engine, classifier)
    readings = read(engine)
    digits_grid(drawings, readings, samples / "digits.png")
    named = [
        label_of(caption) == label
        for caption, label in zip(readings.captions, readings.labels, strict=True)
    ]
    return {
        "generation_accuracy": float((drawings.judged == drawings.labels).mean()),
        "classifier_accuracy": classifier_accuracy,
        "caption_accuracy": float(np.mean(named)),
        **variety(
            Pictures(drawings.images, drawings.labels),
            Pictures(readings.images, readings.labels),
            load("train")[0],
        ),
    }


def judge() -> tuple["SVC", float]:
    """A support-vector classifier of real training digits, and its accuracy on held-out ones."""
    from sklearn.svm import SVC

    images, labels = load("train")
    classifier = SVC(C=10.0, gamma=0.05).fit(images.reshape(len(images), -1), labels)
    images, labels = load("held_out")
    return classifier, float(classifier.score(images.reshape(len(images), -1), labels))


def draw(engine: Engine, classifier: "SVC", count: int = DRAWN, seed: int = 0) -> Drawings:
    """Draws every digit equally often, its wordings in turn; the answer must be one picture."""
    labels = np.arange(count) % 10
    wordings = [captions(label) for label in labels]
    requests = [(texts[i // 10 % len(texts)],) for i, texts in enumerate(wordings)]
    images = [_clipped(only_picture(spans)) for spans in engine.generate(requests, seed)]
    judged = [-1 if x is None else classifier.predict(x.reshape(1, -1))[0] for x in images]
    return Drawings(labels, images, np.asarray(judged))


def _clipped(image: np.ndarray | None) -> np.ndarray | None:
    return None if image is None else np.clip(image, -1, 1)


def read(engine: Engine) -> Readings:
    """Writes a caption for every held-out picture, greedily."""
    images, labels = load("held_out")
    answers = engine.using(temperature=0.0).generate([(image,) for image in images])
    return Readings(images, labels, [only_text(spans) for spans in answers])


def digits_grid(drawings: Drawings, readings: Readings, path: Path) -> None:
    """Left, ten drawings of every digit; right, held-out pictures under the captions written."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left.suptitle("drawn from a caption", color=INK)
    for label, row in enumerate(left.subplots(10, 10)):
        for column, axes in enumerate(row):
            index = label + 10 * column
            _show(axes, drawings.images[index])
            frame(axes, ACCENT if drawings.judged[index] != label else None)
        row[0].set_ylabel(
            NUMBERS[label], rotation=0, ha="right", va="center", fontsize=9, color=INK
        )
    right.suptitle("held-out pictures, captions written by the model", color=INK)
    for index, axes in enumerate(right.subplots(6, 4).flat):
        caption = readings.captions[index]
        correct = label_of(caption) == readings.labels[index]
        _show(axes, readings.images[index])
        frame(axes, None)
        title = wrapped(caption or "(no caption)", 28, 2)
        axes.set_title(title, fontsize=6, color=INK if correct else ACCENT)
    save(figure, path, 150)


def _show(axes: plt.Axes, image: np.ndarray | None) -> None:
    """A digit in dark ink on white; nothing where none came."""
    if image is None:
        axes.set(xticks=[], yticks=[])
    else:
        show(axes, -image)
