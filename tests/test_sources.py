"""The sources: what they hold out, what they promise of documents, and what prepared data give."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image as Picture

from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.autoencoder.config import tiny
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.commands.main import main
from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    SourceConfig,
)
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.pipeline import Data
from transfusion_jax.data.sources import comparisons, digits, sums
from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.data.sources.prepared import Prepared
from transfusion_jax.data.sources.records import STRADDLING
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.source import Source
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer

BUILT_IN = {
    "comparisons": (8, 8, 1),
    "digits": (8, 8, 1),
    "scenes": (32, 32, 3),
    "sums": (8, 8, 1),
    "synthetic": (8, 8, 1),
}


def experiment_of(name: str, shape: tuple[int, int, int], **data) -> Experiment:
    image = ImageConfig(*shape, patch=2 if shape[0] == 8 else 4)
    data = DataConfig(**{"row_length": 200, "sources": (SourceConfig(name),), **data})
    return Experiment("x", image=image, data=data, diffusion=DiffusionConfig(noise_limit=500))


def built_in(name: str, split: str) -> Source:
    (source,) = load_sources(experiment_of(name, BUILT_IN[name]), split)
    if name == "scenes":
        source.count = 300
    return source


def content(document: Document) -> set[bytes]:
    """Its images; of a document without images, its text."""
    images = {x.latent_hwc.tobytes() for x in document.spans if isinstance(x, Image)}
    text = [int(i) for x in document.spans if isinstance(x, Text) for i in x.ids]
    return images or {np.asarray(text).tobytes()}


def contents(source: Source, tokenizer: Tokenizer) -> list[set[bytes]]:
    count = len(source.lengths(tokenizer))
    rng = np.random.default_rng(0)
    return [content(d) for d in source.documents(range(count), tokenizer, rng)]


# --- what every source promises ---


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_documents_keep_to_their_lengths_and_come_in_the_order_asked(name, split, tokenizer):
    source = built_in(name, split)
    lengths = source.lengths(tokenizer)
    splittable = np.broadcast_to(source.splittable, lengths.shape)
    asked = np.random.default_rng(0).integers(len(lengths), size=40).tolist()
    asked += [0, len(lengths) - 1]
    patches = source.experiment.image.patches if hasattr(source, "experiment") else 4
    documents = source.documents(asked, tokenizer, np.random.default_rng(1))
    one_by_one = np.random.default_rng(1)
    for number, document in zip(asked, documents, strict=True):
        taken = len(sequence(document, tokenizer, patches).tokens)
        assert taken <= lengths[number]
        assert splittable[number] != any(isinstance(span, Image) for span in document.spans)
        (same,) = source.documents([number], tokenizer, one_by_one)
        assert content(same) == content(document)


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - {"synthetic"}))
def test_no_document_is_in_both_splits(name, tokenizer):
    train, held_out = (
        contents(built_in(name, split), tokenizer) for split in ("train", "held_out")
    )
    assert set().union(*train).isdisjoint(set().union(*held_out))
    assert min(len(train), len(held_out)) > 20


@pytest.mark.parametrize("name", ["comparisons", "digits", "sums"])
def test_rows_of_a_split_hold_its_documents_alone(name, tokenizer):
    """What `likelihood` measures on: the rows of `Data(..., "held_out")`."""
    experiment = experiment_of(name, BUILT_IN[name])
    experiment = replace(experiment, model=replace(experiment.model, vocab_size=512))

    def rows(split: str) -> set[bytes]:
        found = set()
        for batch in Data(experiment, tokenizer, split).once(1):
            if name == "digits":
                found |= {x.tobytes() for x in batch.latents_BMhwc[0] if x.any()}
                continue
            starts = np.flatnonzero(batch.tokens_BL[0] == tokenizer.bos)
            pieces = np.split(batch.tokens_BL[0], starts)
            found |= {x.tobytes() for x in pieces if tokenizer.eos in x and x[0] == tokenizer.bos}
        return found

    train, held_out = rows("train"), rows("held_out")
    assert train.isdisjoint(held_out) and min(len(train), len(held_out)) > 20


# --- sums, comparisons, digits ---


@pytest.mark.parametrize(
    ("source", "pairs", "held_out", "wordings"), [(sums, 66, 7, 3), (comparisons, 210, 21, 2)]
)
def test_a_pair_of_numbers_is_held_out_in_both_orders_and_all_wordings(
    source, pairs, held_out, wordings
):
    def numbers(prompt: str) -> frozenset[str]:
        return frozenset(word for word in prompt.split() if word in sums.NUMBERS)

    asked = {split: dict(source.problems(split)) for split in ("train", "held_out")}
    unordered = {split: set(map(numbers, problems)) for split, problems in asked.items()}
    assert unordered["train"].isdisjoint(unordered["held_out"])
    assert len(unordered["held_out"]) == held_out
    assert len(unordered["train"]) == pairs - held_out
    for problems in asked.values():
        for pair in set(map(numbers, problems)):
            prompts = [prompt for prompt in problems if numbers(prompt) == pair]
            assert len(prompts) == wordings * len(pair)
    # Each number is in training, so that each held-out problem is about numbers that it knows.
    assert frozenset().union(*unordered["held_out"]) <= frozenset().union(*unordered["train"])


def test_answers_are_right():
    value = {word: number for number, word in enumerate(sums.NUMBERS)}
    for split in ("train", "held_out"):
        for prompt, answer in sums.problems(split):
            a, b = (value[word] for word in prompt.split() if word in value)
            assert a + b == value[answer]
        for prompt, answer in comparisons.problems(split):
            a, b = (value[word] for word in prompt.split() if word in value)
            assert value[answer] == (max(a, b) if "larger" in prompt else min(a, b)) and a != b
        # Naming always the first, or always the second, is right half of the time.
        first = [answer == prompt.split()[3] for prompt, answer in comparisons.problems(split)]
        assert np.mean(first) == 0.5


def test_digits_are_split():
    trained, held_out = (digits.load(split)[0] for split in ("train", "held_out"))
    assert (len(trained), len(held_out)) == (1500, 297)
    pixels = np.concatenate([trained, held_out])
    assert pixels.min() == -1 and pixels.max() == 1


# --- the synthetic source ---


@pytest.mark.parametrize(
    ("image", "row_length"),
    [
        (ImageConfig(), 4096),
        (ImageConfig(), 1024),
        (ImageConfig(), 300),
        (ImageConfig(8, 8, 1, 2), 96),
    ],
)
def test_half_of_the_synthetic_positions_are_patches(image, row_length):
    data = DataConfig(row_length=row_length)
    rows = Data(Experiment("x", image=image, data=data), train_tokenizer(["synthetic text"], 300))
    taken = patches = 0
    for batch in rows.once(8):
        assert np.isfinite(batch.latents_BMhwc).all()
        patches += int((batch.image_start_BM < row_length).sum()) * image.patches
        taken += int((batch.segment_BL > 0).sum())
    assert patches / taken == pytest.approx(0.5, abs=0.01)


# --- prepared data ---


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder of sixty pairs, with captions of many lengths, and one of forty edits."""
    folder = tmp_path_factory.mktemp("raw")
    rng = np.random.default_rng(0)

    def write(path: str) -> None:
        pixels = Picture.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        pixels.resize((32, 32), Picture.Resampling.NEAREST).save(folder / path)

    def lines(path: str, entries: list[dict]) -> None:
        (folder / path).write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    (folder / "pairs").mkdir()
    (folder / "edits").mkdir()
    pairs = []
    edits = []
    for number in range(60):
        write(f"pairs/{number}.png")
        words = " ".join(rng.choice(["red", "green", "blue"], rng.integers(1, 30)))
        pairs.append({"file": f"{number}.png", "caption": f"{words} {number}"})
    for number in range(40):
        write(f"edits/{number}_before.png")
        write(f"edits/{number}_after.png")
        first, second = ({"image": f"{number}_{when}.png"} for when in ("before", "after"))
        edits.append({"spans": [first, {"text": f"make it red {number}"}, second]})
    lines("pairs/captions.jsonl", pairs)
    lines("edits/edits.jsonl", edits)
    return folder


def prepare(raw: Path, out: Path, *more: str) -> Path:
    size = ("--height", "32", "--width", "32", "--vocab-size", "300", "--held-out", "0.2")
    inputs = [str(raw / "pairs")]
    if out.name != "pairs":
        inputs.append(str(raw / "edits" / "edits.jsonl"))
    assert main(["prepare", *inputs, "--out", str(out), *size, *more]) == 0
    return out


@pytest.fixture(scope="module")
def pixels(raw, tmp_path_factory) -> Path:
    return prepare(raw, tmp_path_factory.mktemp("data") / "pixels")


@pytest.fixture(scope="module")
def latents(raw, tmp_path_factory) -> Path:
    """Of an autoencoder that nobody trained."""
    folder = tmp_path_factory.mktemp("data")
    _, abstract = abstract_autoencoder(tiny())
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), nnx.to_pure_dict(abstract)
    )
    save_codec(folder / "codec", tiny(), weights, 1.0, 0.0)
    return prepare(raw, folder / "latents", "--autoencoder", str(folder / "codec"))


def prepared(path: Path, split: str, **data) -> Source:
    shape = open_dataset(path).image_shape
    (source,) = load_sources(experiment_of(str(path), shape, **data), split)
    return source


def edits_of(source: Prepared) -> np.ndarray:
    """The documents of two images."""
    return np.flatnonzero(source.dataset.index.images[source.numbers] == 2)


def test_prepared_splits_share_no_document_and_leave_out_those_that_straddle_them(pixels):
    tokenizer = open_dataset(pixels).tokenizer
    train, held_out = (
        contents(prepared(pixels, split, caption_dropout=0.0), tokenizer)
        for split in ("train", "held_out")
    )
    assert set().union(*train).isdisjoint(set().union(*held_out))
    straddling = int((open_dataset(pixels).index.split == STRADDLING).sum())
    assert len(train) + len(held_out) + straddling == 100
    assert 5 < len(held_out) < 40 and straddling < 30  # a fifth of the pictures, by a hash


def test_latents_are_sampled_and_not_their_means(latents):
    source = prepared(latents, "train", caption_dropout=0.0)
    tokenizer = source.assets.tokenizer
    edit = int(edits_of(source)[0])
    rng = np.random.default_rng(0)
    drawn = [
        [x.latent_hwc for x in document.spans if isinstance(x, Image)]
        for document in source.documents([edit] * 200, tokenizer, rng)
    ]
    drawn = np.asarray(drawn)  # [draws, images, h, w, c]
    deviation = drawn.std(axis=0)
    assert deviation.min() > 0.01
    # Each draw is independent of the others, and each image of the one beside it.
    noise = (drawn - drawn.mean(axis=0)) / deviation
    assert abs((noise[:-1] * noise[1:]).mean()) < 0.02
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 0.02


def test_prepared_edits_are_limited_and_dropped_as_edits_are(pixels):
    source = prepared(pixels, "train")
    tokenizer = source.assets.tokenizer
    edits = edits_of(source).tolist()
    lengths = source.lengths(tokenizer)
    left = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for number, document in zip(edits, source.documents(edits, tokenizer, rng), strict=True):
            images = [x for x in document.spans if isinstance(x, Image)]
            assert [x.noise_limit for x in images] == [500, 1000][-len(images) :]
            assert len(sequence(document, tokenizer, 64).tokens) <= lengths[number]
            left.append((len(images), len(document.spans)))
    shares = {kind: left.count(kind) / len(left) for kind in set(left)}
    assert set(shares) == {(2, 5), (2, 4), (1, 3)}
    assert shares[2, 4] == pytest.approx(0.05, abs=0.02)
    assert shares[1, 3] == pytest.approx(0.05, abs=0.02)


def test_sources_say_what_they_bring(pixels, latents, tokenizer):
    assert prepared(pixels, "train").assets.latents is None
    assets = prepared(latents, "train").assets
    stored = open_dataset(latents).info["image"]
    space = assets.latents
    assert (space.scale, space.shift) == (stored["scale"], stored["shift"])
    assert space.autoencoder == stored["autoencoder"]
    assert (space.directory / "weights.safetensors").is_file()
    assert assets.digest != prepared(pixels, "train").assets.digest
    for name in BUILT_IN:
        made = built_in(name, "train").assets
        assert (made.digest, made.tokenizer, made.latents, made.plans) == (b"", None, None, None)


def test_a_row_length_from_the_data_wastes_little(raw, pixels, tmp_path):
    pairs = prepare(raw, tmp_path / "pairs")
    dataset = open_dataset(pairs)
    image = dataset.image_config(patch=4)
    length = dataset.row_length(image)

    def ledger(path: Path, row_length: int) -> dict:
        data = DataConfig(sources=(SourceConfig(str(path)),), row_length=row_length)
        experiment = Experiment("x", image=image, data=data)
        return Data(experiment, open_dataset(path).tokenizer).ledger()[str(path)]

    derived = ledger(pairs, length)
    assert derived["filled"] > 0.95 and not derived["rejected"]
    assert 3.5 < derived["in_rows"] / derived["rows"] < 5.5
    assert ledger(pairs, 4 * image.span + 64)["filled"] < derived["filled"] - 0.02
    # A row takes the longest document, of two images here, however few images are asked for.
    one = open_dataset(pixels).row_length(image, images=1)
    assert one >= 2 * image.span + 2 and not ledger(pixels, one)["rejected"]
