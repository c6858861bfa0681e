"""Packed rows written as strings, and their attention mask computed pair by pair."""

import numpy as np

from transfusion_jax.batch import Batch

P = 4
IMAGE = (4, 4, 1)

# t: a text token; I: an image of P patches; |: between documents; the rest of the row is padding.
PACKINGS = {
    "one text": "tttttttttt",
    "one image": "tItt",
    "image at both ends": "IttttttttI",
    "several documents": "ttt|ttttt|t|tttt",
    "several images": "tItIttIt",
    "documents with images": "tttIt|Ittt|ttttt|tI|It",
    "padding": "ttI|t",
    "only padding": "",
    "full row": "ttIttIttIttIttItttttt",
}
LENGTH = 36
SLOTS = 6


def _kinds(packing: str) -> list[tuple[int, int]]:
    """(document, image) of every position; image 0 is text, document 0 is padding."""
    kinds = []
    document = 1
    images = 0
    for letter in packing:
        if letter == "|":
            document += 1
        elif letter == "I":
            images += 1
            kinds += [(document, images)] * P
        else:
            kinds.append((document, 0))
    return kinds + [(0, 0)] * (LENGTH - len(kinds))


def mask(packing: str) -> np.ndarray:
    """[L, L]: whether query i sees key j, by the rule as the paper words it (section 3.1)."""
    kinds = _kinds(packing)
    seen = np.zeros((LENGTH, LENGTH), bool)
    for i, (document, image) in enumerate(kinds):
        for j, (other_document, other_image) in enumerate(kinds):
            same_image = image != 0 and image == other_image
            seen[i, j] = document != 0 and document == other_document and (j <= i or same_image)
    return seen


def batch(packings: list[str], seed: int = 0, vocabulary: int = 32) -> Batch:
    """A batch with these rows and random tokens and latents."""
    rng = np.random.default_rng(seed)
    kinds = np.asarray([_kinds(packing) for packing in packings])
    segment = kinds[..., 0].astype(np.int32)
    image = kinds[..., 1]
    index = np.arange(LENGTH)[None]
    first = np.diff(segment, axis=1, prepend=-1) != 0
    position = (index - np.maximum.accumulate(np.where(first, index, 0), axis=1)).astype(np.int32)
    start = np.full((len(packings), SLOTS), LENGTH, np.int32)
    for row, images in enumerate(image):
        for slot in range(images.max()):
            start[row, slot] = np.flatnonzero(images == slot + 1)[0]
    text = (segment > 0) & (image == 0)
    tokens = rng.integers(1, vocabulary, segment.shape).astype(np.int32)
    return Batch(
        tokens_BL=np.where(text, tokens, 0),
        segment_BL=segment,
        position_BL=position,
        text_target_BL=rng.integers(1, vocabulary, segment.shape).astype(np.int32),
        text_weight_BL=text.astype(np.float32),
        latents_BMhwc=rng.standard_normal((len(packings), SLOTS, *IMAGE), np.float32),
        image_start_BM=start,
        image_limit_BM=np.full(start.shape, 1000, np.int32),
    )
