"""The tokenizer of a data set: one that is given, or one trained on a sample of the text."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.errors import require
from transfusion_jax.files import local_path
from transfusion_jax.preparation.readers.raw import Picture, Rejected
from transfusion_jax.preparation.workers import Named, chosen

SAMPLED_ITEMS = 100_000
SAMPLED_CHARACTERS = 20_000_000
SAMPLED_RUN = 64  # neighbours, because archives are read faster in order
SAMPLED_PART = 2_000  # characters of an item that are taken in any case


def given_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a file; None without one.

    Raises:
      ValueError: it cannot be read, or holds no tokenizer.
    """
    if not path:
        return None
    try:
        return Tokenizer(local_path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error.strerror}") from error


def trained_tokenizer(readers: Sequence[Named], vocab_size: int) -> Tokenizer:
    """A tokenizer trained on the text of items that are drawn with a fixed seed.

    Raises:
      ValueError: there is no text, or `vocab_size` is too small for it.
    """
    items = sum(len(reader) for _, reader in readers)
    # So that long texts do not fill the sample before others are reached.
    most = max(SAMPLED_CHARACTERS // max(items, 1), SAMPLED_PART)
    starts = np.random.default_rng(0).permutation(np.arange(0, items, SAMPLED_RUN))
    runs = (
        chosen(readers, range(at, min(at + SAMPLED_RUN, items)))
        for at in starts[: SAMPLED_ITEMS // SAMPLED_RUN].tolist()
    )
    texts = []
    characters = 0
    rejected = Counter()
    for _, reader, index in itertools.chain.from_iterable(runs):
        try:
            raw = reader[index]
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        for text in (*raw.captions, *(span for span in raw.spans if not isinstance(span, Picture))):
            texts += text[:most].encode(errors="ignore").decode().splitlines()
            characters += min(len(text), most)
        if characters > SAMPLED_CHARACTERS:
            break
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
    require(
        any(text.strip() for text in texts),
        "there is no text to train a tokenizer on" + (f"; rejected: {reasons}" if reasons else ""),
    )
    return train_tokenizer(texts, vocab_size)
