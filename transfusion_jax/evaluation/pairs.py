"""Suite `pairs`: a look at any run: held-out captions drawn, and held-out pictures captioned."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.documents import Document, Image, Text
from transfusion_jax.data.pipeline import Data, PlannedSource
from transfusion_jax.evaluation.answers import Spans
from transfusion_jax.evaluation.variety import Pictures, variety
from transfusion_jax.figures import INK, frame, save, show, wrapped
from transfusion_jax.generation.engine import Engine

SHOWN = 16
"""Held-out pairs."""
LOOKED_AT = 4096
"""Held-out documents looked through for them, in each source."""
COMPARED = 4096
"""Training images that drawn ones are compared with, at most."""


def pairs(engine: Engine, samples: Path, rows: int | None) -> dict:
    """Draws and captions held-out pairs; leaves `pairs.png`. Empty where no pair is held out.

    `drawn_share`: share of captions for which a picture came. And, as `pairs_...`, the `variety` of
    what was drawn, all in one class, in the model's own images: pixels, or latents, which are the
    codebook's entries where images are codes. Latents of drawn and of held-out pictures come from
    the pictures, decoded and encoded again; those of the training images, at most `COMPARED`, are
    as stored.
    """
    found = _held_out_pairs(engine)
    if not found:
        return {}
    captions = [caption for caption, _ in found]
    pictures = [engine.picture(image) for _, image in found]
    answers = engine.generate([(caption,) for caption in captions])
    drawn = [_first_picture(spans) for spans in answers]
    told = engine.using(temperature=0.0).generate([(picture,) for picture in pictures])
    texts = [next((s for s in spans if isinstance(s, str)), "") for spans in told]
    pairs_grid(captions, drawn, pictures, texts, samples / "pairs.png")
    one_class = [0] * len(found)
    measured = variety(
        Pictures([None if x is None else engine.latent(engine.image(x)) for x in drawn], one_class),
        Pictures([engine.latent(engine.image(x)) for x in pictures], one_class),
        _training_images(engine, COMPARED),
    )
    return {
        "drawn_share": float(np.mean([image is not None for image in drawn])),
        **{f"pairs_{name}": value for name, value in measured.items()},
    }


def _first_picture(spans: Spans) -> np.ndarray | None:
    """The first picture of an answer, within the range of pictures; what holds values that are not
    finite is none."""
    pictures = (span for span in spans if not isinstance(span, str) and np.isfinite(span).all())
    return next((np.clip(picture, -1, 1) for picture in pictures), None)


def _held_out_pairs(engine: Engine) -> list[tuple[str, np.ndarray]]:
    """Caption and image of the first held-out documents of one image and a text."""
    data = Data(engine.experiment, engine.tokenizer, "held_out")
    rng = np.random.default_rng(0)
    found = []
    for source in data.sources:
        for number in _with_images(source, np.unique(source.plan.document))[:LOOKED_AT]:
            (document,) = source.source.documents([number], engine.tokenizer, rng)
            images = _images(document)
            ids = [i for span in document.spans if isinstance(span, Text) for i in span.ids]
            caption = engine.tokenizer.decode(ids)  # BOS and EOS have no text
            if len(images) == 1 and caption:
                found.append((caption, images[0]))
            if len(found) == SHOWN:
                return found
    return found


def _training_images(engine: Engine, most: int) -> np.ndarray:
    """At most so many images of training documents, from every source, as latents; [n, h, w,
    c]."""
    data = Data(engine.experiment, engine.tokenizer, "train")
    found = []
    for number, source in enumerate(data.sources):
        share = (most - len(found)) // (len(data.sources) - number)
        found += itertools.islice(_source_images(engine, source, share), share)
    if not found:
        return np.zeros((0, *engine.experiment.image.shape), np.float32)
    return np.stack([engine.latent(image) for image in found])


def _source_images(engine: Engine, source: PlannedSource, most: int) -> Iterator[np.ndarray]:
    """Images of rows drawn from a source with a fixed seed, at most so many rows."""
    rng = np.random.default_rng(0)
    for r in rng.choice(len(source), min(most, len(source)), replace=False).tolist():
        in_row = dict.fromkeys(number for number, _, _ in source.plan.row(r))
        numbers = _with_images(source, np.asarray(list(in_row)))
        for document in source.source.documents(numbers, engine.tokenizer, rng):
            yield from _images(document)


def _with_images(source: PlannedSource, numbers: np.ndarray) -> list[int]:
    """Those of the documents that hold images: rows may split all others."""
    splittable = np.asarray(source.source.splittable)
    text_only = splittable[numbers] if splittable.ndim else np.full(len(numbers), bool(splittable))
    return numbers[~text_only].tolist()


def _images(document: Document) -> list[np.ndarray]:
    return [span.latent_hwc for span in document.spans if isinstance(span, Image)]


def pairs_grid(
    captions: Sequence[str],
    drawn: Sequence[np.ndarray | None],
    images: Sequence[np.ndarray],
    told: Sequence[str],
    path: Path,
) -> None:
    """Left, what was drawn from held-out captions; right, what was written about pictures."""
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    titles = ("drawn from held-out captions", "held-out pictures, captions written by the model")
    columns = zip(figure.subfigures(1, 2), titles, (drawn, images), (captions, told), strict=True)
    for part, title, pictures, texts in columns:
        part.suptitle(title, color=INK)
        grid = part.subplots(4, 4)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            frame(axes, None)
        for axes, picture, text in zip(grid.flat, pictures, texts, strict=False):
            if picture is not None:
                show(axes, picture)
            axes.set_xlabel(wrapped(text or "(no caption)", 28, 3), fontsize=7, color=INK)
    save(figure, path, 120)
