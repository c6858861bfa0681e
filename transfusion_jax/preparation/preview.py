"""What a prepared data set looks like: a contact sheet, a sample of text, and a few lines."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import Dataset
from transfusion_jax.figures import INK, save, show, wrapped

PICTURES, DOCUMENTS = 40, 30


ToPicture = Callable[[np.ndarray], np.ndarray]
"""An image of the model's, float32 [h, w, c], to a picture in [-1, 1] with 1 or 3 channels."""


def to_picture(dataset: Dataset) -> ToPicture:
    """From an image of the data set, as the model sees it, to a picture in [-1, 1]."""
    if dataset.stored == "pixels":
        return lambda image: image
    from transfusion_jax.autoencoder.codec import load_codec

    return load_codec(dataset.path / "autoencoder").picture  # it carries the scale of the data


def leave_samples(dataset: Dataset) -> None:
    """Writes `contact_sheet.png` and `sample.txt`, drawn from the data set with a fixed seed."""
    rng = np.random.default_rng(0)
    index = dataset.index
    with_images = _drawn(np.flatnonzero(index.images), PICTURES, rng)
    picture = to_picture(dataset)
    shown, captions = [], []
    for number in with_images.tolist():
        record = dataset.record(number)
        stored = next(x for kind, x in record.spans if kind == records.IMAGE)
        shown.append(picture(dataset.image(stored)))
        captions.append(_text(dataset, record).replace("[image]", "").strip())
    info = dataset.info
    title = (
        f"{info['documents']:,} documents, {info['images']:,} images, "
        f"{info['text_tokens']:,} text tokens"
    )
    if shown:
        contact_sheet(shown, captions, title, dataset.path / "contact_sheet.png")
    chosen = _drawn(np.arange(len(index.text)), DOCUMENTS, rng)
    texts = (
        f"--- document {number}\n{_text(dataset, dataset.record(number))}\n"
        for number in chosen.tolist()
    )
    (dataset.path / "sample.txt").write_text("".join(texts), encoding="utf-8")


def _drawn(numbers: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Some of these numbers, in order."""
    return np.sort(rng.choice(numbers, min(count, len(numbers)), replace=False))


def _text(dataset: Dataset, record: records.Record) -> str:
    """A record as text, an image as [image], captions parted by bars."""
    decode = dataset.tokenizer.decode
    spans = ["[image]" if kind == records.IMAGE else decode(x) for kind, x in record.spans]
    return " ".join(filter(None, [" | ".join(map(decode, record.captions)), *spans]))


def description(dataset: Dataset) -> str:
    """What was made, what was rejected, and how to train on it."""
    info, ledger, (h, w, c) = dataset.info, dataset.info["ledger"], dataset.image_shape
    reasons = ", ".join(f"{n} {reason}" for reason, n in ledger["reasons"].items())
    dropped = ", ".join(f"{n} {reason}" for reason, n in ledger["captions_dropped"].items())
    folder: Path = dataset.path
    images = (
        f", {info['images']:,} images of {h}x{w}x{c} {info['image']['stored']}"
        if info["images"]
        else ""
    )
    between = info.get("straddle_the_split", 0)
    straddling = f", {between:,} straddle the split and are in neither part" if between else ""
    shape = f" {dataset.flags}" if info["images"] else ""
    sheet = f"{folder / 'contact_sheet.png'}, " if info["images"] else ""
    return "\n".join([
        f"{folder}: {info['documents']:,} documents ({info['held_out']:,} held out{straddling})"
        f"{images}, {info['text_tokens']:,} text tokens",
        f"  items     {ledger['items']:,} read = {ledger['written']:,} written + "
        f"{ledger['rejected']:,} rejected"
        + (f" ({reasons}; see {folder / 'rejected.jsonl'})" if reasons else ""),
        *([f"  captions  {dropped}, left out of documents that have others"] if dropped else []),
        f"  tokenizer {info['tokenizer']['entries']:,} ids",
        f"  look at   {sheet}{folder / 'sample.txt'}",
        f"  train     --data.sources.0.name {folder}{shape} "
        f"--model.vocab-size {dataset.embedding_rows}",
    ])  # fmt: skip


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, path: Path
) -> None:
    """Pictures in [-1, 1] in a grid, each over its caption."""
    columns = min(8, max(len(pictures), 1))
    rows = -(-max(len(pictures), 1) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.9 * columns, 2.3 * rows + 0.4),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title, color=INK, fontsize=11)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, picture, caption in zip(grid.flat, pictures, captions, strict=False):
        show(axes, picture)
        axes.set_xlabel(wrapped(caption, 24, 4), fontsize=6.5, color=INK)
    save(figure, path, 110)
