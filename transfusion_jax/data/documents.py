"""Documents: ordered spans of text and images, and the token sequence that each becomes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfusion_jax.config import DataConfig, DiffusionConfig
from transfusion_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    ids: Sequence[int]


@dataclass(frozen=True)
class Image:
    latent_hwc: np.ndarray
    noise_limit: int
    """Timesteps are drawn below this."""


@dataclass(frozen=True)
class Document:
    spans: tuple[Text | Image, ...]
    learn_from: int = 0
    """The span from which text is under the language-model loss."""


@dataclass(frozen=True)
class Sequenced:
    """A document as a token sequence, each image wrapped `BOI patch * P EOI`.

    `<s> cat BOI p p EOI </s>` has the targets `cat BOI - - - </s> -`, `-` being weight 0: there is
    no text loss where the input is BOI or a patch, nor at the end.
    """

    tokens: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    images: tuple[tuple[int, Image], ...]
    """Position of the first patch, and the image."""


def sequence(document: Document, tokenizer: Tokenizer, patches: int) -> Sequenced:
    length = sum(
        len(span.ids) if isinstance(span, Text) else patches + 2 for span in document.spans
    )
    tokens = np.zeros(length, np.int32)
    has_target = np.zeros(length, np.float32)
    images = []
    at = 0
    for number, span in enumerate(document.spans):
        if number == document.learn_from:
            has_target[:at] = 0
        if isinstance(span, Text):
            end = at + len(span.ids)
            tokens[at:end] = span.ids
            has_target[at:end] = 1
        else:
            images.append((at + 1, span))
            end = at + patches + 2
            tokens[at] = tokenizer.boi
            tokens[end - 1] = tokenizer.eoi
            has_target[end - 1] = 1
        at = end
    has_target[-1:] = 0
    return Sequenced(tokens, np.append(tokens[1:], np.int32(0)), has_target, tuple(images))


def pair_document(
    captions: Sequence[Sequence[int]],
    latent_hwc: np.ndarray,
    tokenizer: Tokenizer,
    data: DataConfig,
    diffusion: DiffusionConfig,
    rng: np.random.Generator,
) -> Document:
    """A text-image pair as trained in one epoch: a caption, and the order, drawn from `rng`.

    image first (20 %)     <s> BOI image EOI caption </s>    under the noise limit
    caption first (80 %)   <s> caption BOI image EOI </s>
    caption dropped        <s> BOI image EOI </s>            for guidance; no text loss
    """
    caption = captions[rng.integers(len(captions))]
    image_first = rng.random() < data.image_first
    dropped = rng.random() < data.caption_dropout
    bos = [tokenizer.bos]
    eos = [tokenizer.eos]
    if image_first:
        image = Image(latent_hwc, diffusion.context_limit)
        return Document((Text(bos), image, Text([*caption, *eos])))
    image = Image(latent_hwc, diffusion.steps)
    if dropped:
        return Document((Text(bos), image, Text(eos)), learn_from=2)
    return Document((Text([*bos, *caption]), image, Text(eos)))


def pair_length(captions: Sequence[Sequence[int]], span: int) -> int:
    """The most positions that a `pair_document` takes, for an image of `span` positions."""
    return max(map(len, captions)) + span + 2


def interleaved_document(
    spans: Sequence[Text | np.ndarray],
    tokenizer: Tokenizer,
    data: DataConfig,
    diffusion: DiffusionConfig,
    rng: np.random.Generator,
) -> Document:
    """Text and images [h, w, c] in any order, as trained in one epoch.

    An image that something follows is context for it, and under the noise limit.

    For guidance, `data.caption_dropout` of the documents lose what comes before one of their images
    (drawn among those with something before them): its text or, in `data.image_dropout` of these
    cases, everything. What follows the image stays; text before it carries no loss.

        as it is         <s> BOI a EOI make it red BOI b EOI </s>
        text dropped     <s> BOI a EOI BOI b EOI </s>
        all dropped      <s> BOI b EOI </s>                  what guidance contrasts with
    """
    spans, learn_from = _drop_context(spans, data, rng)
    made = [
        span
        if isinstance(span, Text)
        else Image(span, diffusion.context_limit if at < len(spans) - 1 else diffusion.steps)
        for at, span in enumerate(spans)
    ]
    return Document((Text([tokenizer.bos]), *made, Text([tokenizer.eos])), learn_from)


def _drop_context(
    spans: Sequence[Text | np.ndarray], data: DataConfig, rng: np.random.Generator
) -> tuple[Sequence[Text | np.ndarray], int]:
    """The spans that are left, and the span of the document, BOS being 0, to learn text from."""
    conditioned = [at for at, x in enumerate(spans) if at > 0 and not isinstance(x, Text)]
    if not conditioned or rng.random() >= data.caption_dropout:
        return spans, 0
    at = conditioned[rng.integers(len(conditioned))]
    before = [x for x in spans[:at] if not isinstance(x, Text)]
    if rng.random() < data.image_dropout:
        before = []
    return [*before, *spans[at:]], len(before) + 2


def text_document(ids: Sequence[int], tokenizer: Tokenizer) -> Document:
    return Document((Text([tokenizer.bos, *ids, tokenizer.eos]),))
