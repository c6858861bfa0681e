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
    learn_text: bool = True
    """Whether its text is under the language-model loss."""


@dataclass(frozen=True)
class Sequenced:
    """A document as a token sequence, each image wrapped `BOI patch * P EOI`.

    `<s> cat BOI p p EOI </s>` has the targets `cat BOI - - - </s> -`, `-` being weight 0: there is no text loss
    where the input is BOI or a patch, nor at the end.
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
    tokens, has_target, images, at = np.zeros(length, np.int32), np.zeros(length, np.float32), [], 0
    for span in document.spans:
        if isinstance(span, Text):
            end = at + len(span.ids)
            tokens[at:end], has_target[at:end] = span.ids, 1
        else:
            images.append((at + 1, span))
            end = at + patches + 2
            tokens[at], tokens[end - 1], has_target[end - 1] = tokenizer.boi, tokenizer.eoi, 1
        at = end
    has_target[-1:] = 0
    if not document.learn_text:
        has_target[:] = 0
    return Sequenced(tokens, np.append(tokens[1:], np.int32(0)), has_target, tuple(images))


def pair_document(
    captions: Sequence[Sequence[int]],
    latent_hwc: np.ndarray,
    tokenizer: Tokenizer,
    data: DataConfig,
    diffusion: DiffusionConfig,
    rng: np.random.Generator,
) -> Document:
    """A text-image pair as the document of one epoch: one of its captions, and the order, drawn from `rng`.

        image first (20 %)     <s> BOI image EOI caption </s>    under the noise limit
        caption first (80 %)   <s> caption BOI image EOI </s>
        caption dropped        <s> BOI image EOI </s>            unconditional, so no text loss
    """  # fmt: skip
    caption = captions[rng.integers(len(captions))]
    image_first, dropped = rng.random() < data.image_first, rng.random() < data.caption_dropout
    bos, eos = [tokenizer.bos], [tokenizer.eos]
    if image_first:
        return Document(
            (Text(bos), Image(latent_hwc, diffusion.noise_limit), Text([*caption, *eos]))
        )
    image = Image(latent_hwc, diffusion.steps)
    if dropped:
        return Document((Text(bos), image, Text(eos)), learn_text=False)
    return Document((Text([*bos, *caption]), image, Text(eos)))


def pair_length(captions: Sequence[Sequence[int]], span: int) -> int:
    """Positions that `pair_document` takes at most: BOS, the longest caption, the image's `span`, EOS."""
    return max(map(len, captions)) + span + 2


def text_document(ids: Sequence[int], tokenizer: Tokenizer) -> Document:
    return Document((Text([tokenizer.bos, *ids, tokenizer.eos]),))
