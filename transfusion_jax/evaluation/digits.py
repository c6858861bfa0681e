"""Digits drawn and digits read, judged by what the real digits say."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.svm import SVC

from transfusion_jax.data.sources import digits
from transfusion_jax.figures import ACCENT, INK, save
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import to_uint8

DRAWN = 500


@dataclass(frozen=True)
class Drawn:
    """Requests to draw, what came, and what the judge made of it (-1: no picture came)."""

    labels: np.ndarray
    images: list[np.ndarray | None]
    judged: np.ndarray


@dataclass(frozen=True)
class Read:
    """Held-out pictures, their labels and the captions that the model wrote."""

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]


def judge() -> tuple[SVC, float]:
    """A support-vector classifier trained on the real training digits, and its accuracy on the held-out ones."""
    images, labels = digits.load("train")
    classifier = SVC(C=10.0, gamma=0.05).fit(images.reshape(len(images), -1), labels)
    images, labels = digits.load("held_out")
    return classifier, float(classifier.score(images.reshape(len(images), -1), labels))


def draw(engine: Engine, classifier: SVC, count: int = DRAWN, seed: int = 0) -> Drawn:
    """Draws every digit equally often, its captions in turn; the first span must be a picture."""
    labels = np.arange(count) % 10
    wordings = [digits.captions(label) for label in labels]
    requests = [(texts[i // 10 % len(texts)],) for i, texts in enumerate(wordings)]
    spans = engine.generate(requests, seed)
    images = [s[0] if s and isinstance(s[0], np.ndarray) else None for s in spans]
    judged = np.asarray(
        [
            -1 if i is None else classifier.predict(np.clip(i, -1, 1).reshape(1, -1))[0]
            for i in images
        ]
    )
    return Drawn(labels, images, judged)


def read(engine: Engine) -> Read:
    """Writes a caption for every held-out picture."""
    images, labels = digits.load("held_out")
    spans = engine.using(temperature=0.0).generate([(image,) for image in images])
    return Read(
        images, labels, [s[0] if len(s) == 1 and isinstance(s[0], str) else "" for s in spans]
    )


def scores(drawn: Drawn, captions: Read, classifier_accuracy: float) -> dict:
    """`generation_accuracy` of the drawn digits, `classifier_accuracy` of their judge on real ones, and
    `caption_accuracy`: captions that are one of the right wordings, to the letter."""
    named = [
        digits.label_of(caption) == label
        for caption, label in zip(captions.captions, captions.labels, strict=True)
    ]
    return {
        "generation_accuracy": float((drawn.judged == drawn.labels).mean()),
        "classifier_accuracy": classifier_accuracy,
        "caption_accuracy": float(np.mean(named)),
    }


def digits_grid(drawn: Drawn, captions: Read, path: Path) -> None:
    """Left, ten drawings of every digit; right, held-out pictures with the captions written for them."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left.suptitle("drawn from a caption", color=INK)
    for label, row in enumerate(left.subplots(10, 10)):
        for column, axes in enumerate(row):
            index = label + 10 * column
            wrong = drawn.judged[index] != label
            _show(axes, drawn.images[index], frame=ACCENT if wrong else None)
        row[0].set_ylabel(
            digits.NUMBERS[label], rotation=0, ha="right", va="center", fontsize=9, color=INK
        )
    right.suptitle("held-out pictures, captions written by the model", color=INK)
    for index, axes in enumerate(right.subplots(6, 4).flat):
        correct = digits.label_of(captions.captions[index]) == captions.labels[index]
        _show(axes, captions.images[index])
        axes.set_title(
            captions.captions[index] or "(no caption)", fontsize=6, color=INK if correct else ACCENT
        )
    save(figure, path, 150)


def _show(axes: plt.Axes, image: np.ndarray | None, frame: str | None = None) -> None:
    if image is not None:
        axes.imshow(to_uint8(image), cmap="gray_r", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, color=frame or INK, linewidth=1.5)
