"""A look at any run: held-out captions drawn, and held-out pictures captioned."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.documents import Image, Text
from transfusion_jax.data.pipeline import Data
from transfusion_jax.figures import INK, save, show, wrapped
from transfusion_jax.generation.engine import Engine

SHOWN = 16


def pairs(engine: Engine, samples: Path) -> dict:
    """`drawn_share`: share of held-out captions that a picture was drawn for; leaves `pairs.png`.

    Without held-out pairs it says nothing.
    """
    found = _pairs(engine)
    if not found:
        return {}
    captions, pictures = zip(*found, strict=True)
    spans = engine.generate([(caption,) for caption in captions])
    drawn = [next((s for s in given if not isinstance(s, str)), None) for given in spans]
    told = engine.using(temperature=0.0).generate([(picture,) for picture in pictures])
    texts = [next((s for s in given if isinstance(s, str)), "") for given in told]
    pairs_grid(captions, drawn, pictures, texts, samples / "pairs.png")
    return {"drawn_share": float(np.mean([image is not None for image in drawn]))}


def _pairs(engine: Engine) -> list[tuple[str, np.ndarray]]:
    """Caption and picture of the first held-out documents of one image and a text."""
    data, rng, found = (
        Data(engine.experiment, engine.tokenizer, "held_out"),
        np.random.default_rng(0),
        [],
    )
    for source in data.sources:
        for number in np.unique(source.plan.document).tolist():
            (document,) = source.source.documents([number], engine.tokenizer, rng)
            images = [span.latent_hwc for span in document.spans if isinstance(span, Image)]
            ids = [i for span in document.spans if isinstance(span, Text) for i in span.ids]
            caption = engine.tokenizer.decode(ids)  # BOS and EOS have no text
            if len(images) == 1 and caption:
                found.append((caption, engine.picture(images[0])))
            if len(found) == SHOWN:
                return found
    return found


def pairs_grid(
    captions: Sequence[str], drawn: Sequence[np.ndarray | None], images: Sequence[np.ndarray], told: Sequence[str],
    path: Path,
) -> None:  # fmt: skip
    """Left, what was drawn from held-out captions; right, held-out pictures with what was written about them."""
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    titles = ("drawn from held-out captions", "held-out pictures, captions written by the model")
    columns = zip(figure.subfigures(1, 2), titles, (drawn, images), (captions, told), strict=True)
    for part, title, pictures, texts in columns:
        part.suptitle(title, color=INK)
        for axes in (grid := part.subplots(4, 4)).flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, picture, text in zip(grid.flat, pictures, texts, strict=False):
            if picture is not None:
                show(axes, picture)
            axes.set_xlabel(wrapped(text or "(no caption)", 28, 3), fontsize=7, color=INK)
    save(figure, path, 120)
