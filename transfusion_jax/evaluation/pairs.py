"""A look at any run: held-out captions drawn, and held-out pictures captioned."""

from pathlib import Path

import numpy as np

from transfusion_jax.data.documents import Image, Text
from transfusion_jax.data.pipeline import Data
from transfusion_jax.evaluation.figures import pairs_grid
from transfusion_jax.generation.engine import Engine

SHOWN = 16


def pairs(engine: Engine, samples: Path) -> dict:
    """`drawn_share`: share of held-out captions that a picture was drawn for; leaves `pairs.png`.

    Without held-out pairs it says nothing.
    """
    found = _pairs(engine)
    if not found:
        return {}
    captions, images = zip(*found, strict=True)
    spans = engine.generate([(caption,) for caption in captions])
    drawn = [next((s for s in given if not isinstance(s, str)), None) for given in spans]
    told = engine.using(temperature=0.0).generate([(image,) for image in images])
    texts = [next((s for s in given if isinstance(s, str)), "") for given in told]
    shown = [None if image is None else engine.picture(image) for image in drawn]
    pairs_grid(captions, shown, [engine.picture(image) for image in images], texts, samples / "pairs.png")
    return {"drawn_share": float(np.mean([image is not None for image in drawn]))}


def _pairs(engine: Engine) -> list[tuple[str, np.ndarray]]:
    """The first held-out documents of one image and a caption."""
    data, rng, found = Data(engine.experiment, engine.tokenizer, "held_out"), np.random.default_rng(0), []
    for source in data.sources:
        for number in np.unique(source.plan.document).tolist():
            document = source.source.document(number, engine.tokenizer, rng)
            images = [span.latent_hwc for span in document.spans if isinstance(span, Image)]
            ids = [i for span in document.spans if isinstance(span, Text) for i in span.ids]
            caption = engine.tokenizer.decode(ids)  # BOS and EOS have no text
            if len(images) == 1 and caption:
                found.append((caption, images[0]))
            if len(found) == SHOWN:
                return found
    return found
