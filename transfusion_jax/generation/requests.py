"""Requests: unfinished documents of texts and pictures, and the batch that the model reads."""

from collections.abc import Callable, Sequence

import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, Image, Sequenced, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.data.tokenizer import Tokenizer

Request = Sequence[str | np.ndarray]
"""Texts and pictures [H, W, C] in [-1, 1], in order."""
BUCKET = 32
"""Prompts are padded to a multiple of this, so few lengths are compiled."""


def ends_in_text(request: Request) -> bool:
    """Whether what it is answered with goes on after a text, not after an image or nothing."""
    return bool(request) and isinstance(request[-1], str) and request[-1] != ""


def read_requests(
    requests: Sequence[Request],
    experiment: Experiment,
    tokenizer: Tokenizer,
    encode: Callable[[np.ndarray], np.ndarray],
) -> tuple[Batch, np.ndarray]:
    """Every request as a row, `<s>` first, and the rows' lengths [B], on the host.

    Args:
      encode: from a picture to an image of the model.

    Raises:
      ValueError: a request is longer than a row.
    """
    prompts = [_prompt(request, experiment, tokenizer, encode) for request in requests]
    lengths = [len(prompt.tokens) for prompt in prompts]
    longest, row_length = max(lengths), experiment.data.row_length
    if longest > row_length:
        raise ValueError(
            f"a prompt takes {longest} positions, more than data.row_length={row_length}"
        )
    padded = -(-longest // BUCKET) * BUCKET
    rows = [
        pack([(prompt, 0, length)], padded, experiment.image)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return stack(rows), np.asarray(lengths, np.int32)


def _prompt(
    request: Request,
    experiment: Experiment,
    tokenizer: Tokenizer,
    encode: Callable[[np.ndarray], np.ndarray],
) -> Sequenced:
    spans: list[Text | Image] = [Text([tokenizer.bos])]
    for span in request:
        if isinstance(span, str):
            spans.append(Text(tokenizer.encode(span)))
        else:
            spans.append(Image(encode(span), noise_limit=1))
    return sequence(Document(tuple(spans)), tokenizer, experiment.image.patches)
