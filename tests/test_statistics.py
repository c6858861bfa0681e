"""Every random draw over many steps, rows and epochs: its distribution, and that none is a copy.

Seeds are fixed, so nothing here fails by chance; bounds are five standard deviations.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny
from flax import nnx

from transfusion_jax.autoencoder import config as autoencoder_config
from transfusion_jax.autoencoder.codec import save_codec
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.batch import Batch
from transfusion_jax.config import DataConfig, DiffusionConfig, Experiment, SourceConfig
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.data.sources.dataset import open_dataset
from transfusion_jax.diffusion.process import draw_training_noise
from transfusion_jax.generation.engine import Engine
from transfusion_jax.preparation.prepare import Preparation, prepare
from transfusion_jax.pretraining.step import compiled_step

EPOCHS = 3


def assert_share(found, probability: float, what: str):
    """The mean of booleans, against the probability that each is true."""
    found = np.asarray(found, bool)
    deviation = np.sqrt(probability * (1 - probability) / found.size)
    assert abs(found.mean() - probability) < 5 * deviation, f"{what}: {found.mean()}"


def assert_uncorrelated(a, b, what: str):
    a, b = np.ravel(a), np.ravel(b)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size), what


# Timesteps and noise of training.

LIMITS = np.asarray([[100, 50, 7, 1]] * 24, np.int32)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [step, row, slot] and noise [step, row, slot, h, w, c]."""
    limit_BM, latents = jnp.asarray(LIMITS), jnp.zeros((24, 4, 4, 4, 1))

    @jax.jit
    def steps(keys):
        return jax.vmap(lambda key: draw_training_noise(key, limit_BM, latents))(keys)

    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(jnp.arange(200))
    t, noise = steps(keys)
    return np.asarray(t), np.asarray(noise)


def test_timesteps_are_uniform_below_the_limit(drawn):
    t, _ = drawn
    for slot, limit in enumerate(LIMITS[0]):
        found = t[:, :, slot]
        assert (found.min(), found.max()) == (0, limit - 1)
        for value in range(min(limit, 10)):  # tenths, or the values themselves
            share = (found * min(limit, 10) // limit == value).mean()
            expected = sum(v * min(limit, 10) // limit == value for v in range(limit)) / limit
            bound = 5 * np.sqrt(expected * (1 - expected) / found.size)
            assert abs(share - expected) <= bound, (limit, value)


def test_timesteps_differ_between_rows_slots_and_steps(drawn):
    t, _ = drawn
    assert_share(t[:, 1:, 0] == t[:, :-1, 0], 1 / 100, "rows")
    assert_share(t[1:, :, 0] == t[:-1, :, 0], 1 / 100, "steps")
    assert_share(t[:, :, 0] // 2 == t[:, :, 1], 1 / 50, "slots")
    assert_uncorrelated(t[:, :, 0], t[:, :, 1], "slots")
    assert_uncorrelated(t[:, 1:, 0], t[:, :-1, 0], "rows")
    assert_uncorrelated(t[1:, :, 0], t[:-1, :, 0], "steps")


def test_noise_is_standard_normal_and_nowhere_the_same(drawn):
    t, noise = drawn
    n = noise.size
    assert abs(noise.mean()) < 5 / np.sqrt(n)
    assert abs((noise**2).mean() - 1) < 5 * np.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert_uncorrelated(noise[1:], noise[:-1], "steps")
    assert_uncorrelated(noise[:, 1:], noise[:, :-1], "rows")
    assert_uncorrelated(noise[:, :, 1:], noise[:, :, :-1], "slots")
    assert_uncorrelated(noise[..., 1:, :, :], noise[..., :-1, :, :], "image rows")
    assert_uncorrelated(noise[..., 1:, :], noise[..., :-1, :], "image columns")
    for h in range(4):
        assert_uncorrelated(noise[..., h, 0, 0], t, "noise and timesteps")


def shallow() -> Experiment:
    experiment = tiny.small()
    return replace(
        experiment,
        model=replace(experiment.model, layers=1, attention="dense"),
        train=replace(experiment.train, accumulation=1),
    )


def rows_with_an_image(limit: int) -> Batch:
    """Four of them, one image each, whose timesteps are below the limit."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, *tiny.IMAGE.shape)).astype(np.float32)
    rows = []
    for image in pixels:
        made = sequence(Document((Text([1]), Image(image, limit), Text([2]))), tiny.TOKENIZER, 4)
        rows.append(pack([(made, 0, len(made.tokens))], 48, tiny.IMAGE))
    return jax.tree.map(jnp.asarray, stack(rows))


def test_steps_draw_anew_and_a_seed_repeats():
    """The image loss of one batch and the same weights, at different steps."""
    plan = tiny.planned(shallow())
    step, batch = compiled_step(plan), rows_with_an_image(100)

    def image_loss(n: int) -> float:
        state = tiny.fresh_state(plan, tiny.random_parameters(plan))
        moved = jax.device_put(jnp.asarray(n, jnp.int32), state.step.sharding)
        return float(step(replace(state, step=moved), batch)[1]["image_loss"])

    found = [image_loss(n) for n in (0, 1, 2, 3, 1000)]
    assert len(set(found)) == len(found)
    assert image_loss(1) == found[1]


def test_steps_draw_timesteps_as_the_config_says():
    """Logits far below 0 are the timestep 0, as a limit of 1 is."""
    uniform = shallow()
    low = replace(uniform.diffusion, timesteps="logit_normal", timestep_mean=-50.0)

    def image_loss(experiment: Experiment, limit: int) -> float:
        plan = tiny.planned(experiment)
        state = tiny.fresh_state(plan, tiny.random_parameters(plan))
        return float(compiled_step(plan)(state, rows_with_an_image(limit))[1]["image_loss"])

    drawn = image_loss(replace(uniform, diffusion=low), 100)
    assert drawn == image_loss(uniform, 1)
    assert drawn != image_loss(uniform, 100)


def test_the_seed_draws_the_weights():
    """Every matrix of two seeds is independent, and a seed repeats."""
    experiment = tiny.small()

    def weights(seed: int):
        seeded = replace(experiment, train=replace(experiment.train, seed=seed))
        parameters = tiny.planned(seeded).initialise().parameters
        return jax.tree.leaves(jax.device_get(parameters))

    first, again, other = weights(3), weights(3), weights(4)
    drawn = [n for n, x in enumerate(first) if x.std() > 0]  # norms are ones, the last layer 0
    assert len(drawn) > 10
    for n in drawn:
        np.testing.assert_array_equal(first[n], again[n])
        assert_uncorrelated(first[n], other[n], "seeds")


# What the data pipeline draws.


@dataclass(frozen=True)
class Pair:
    """A pair as it stands in a row."""

    picture: bytes
    latent: np.ndarray
    caption: tuple[int, ...]
    image_first: bool
    limit: int
    learned: bool


def pairs_of(row) -> list[Pair]:
    found = []
    for slot, start in enumerate(row.image_start_BM):
        if start == len(row.tokens_BL):
            continue
        own = np.flatnonzero(row.segment_BL == row.segment_BL[start])
        patches = row.latents_BMhwc[slot].size // 4
        before = row.tokens_BL[own[0] + 1 : start - 1].tolist()
        after = row.tokens_BL[start + patches + 1 : own[-1]].tolist()
        assert not (before and after)
        latent = row.latents_BMhwc[slot]
        found.append(
            Pair(
                latent.tobytes(),
                latent,
                tuple(before or after),
                bool(after),
                int(row.image_limit_BM[slot]),
                bool(row.text_weight_BL[own].any()),
            )
        )
    return found


def epochs_of(data: Data) -> list[list[list[Pair]]]:
    """The pairs of every row of every epoch."""
    rows, length = data.rows(), len(data.sources[0])
    return [[pairs_of(rows[e * length + r]) for r in range(length)] for e in range(EPOCHS)]


@pytest.fixture(scope="module")
def digits(experiment, tokenizer) -> list[list[list[Pair]]]:
    experiment = replace(
        experiment,
        data=replace(experiment.data, sources=(SourceConfig("digits"),)),
        diffusion=DiffusionConfig(noise_limit=500),
    )
    return epochs_of(Data(experiment, tokenizer))


def by_picture(epoch: list[list[Pair]]) -> dict[bytes, Pair]:
    return {pair.picture: pair for row in epoch for pair in row}


def wording(tokenizer, pair: Pair) -> int:
    text = tokenizer.decode(pair.caption)
    marks = ("a handwritten", "the digit", "a drawing", "by hand")
    return next(n for n, mark in enumerate(marks) if mark in text)


def test_captions_orders_and_dropout_in_their_shares(digits, tokenizer):
    pairs = [pair for epoch in digits for row in epoch for pair in row]
    assert len(pairs) == EPOCHS * 1500
    assert_share([p.image_first for p in pairs], 0.2, "image first")
    captionless = [not p.caption for p in pairs if not p.image_first]
    assert_share(captionless, 0.1, "caption dropped")
    wordings = [wording(tokenizer, p) for p in pairs if p.caption]
    for n in range(4):
        assert_share(np.asarray(wordings) == n, 0.25, f"wording {n}")
    assert all(p.limit == (500 if p.image_first else 1000) for p in pairs)
    assert all(p.learned == bool(p.caption) for p in pairs)


def test_choices_are_made_anew_for_every_pair_and_epoch(digits, tokenizer):
    neighbours = [(a, b) for e in digits for row in e for a, b in zip(row, row[1:], strict=False)]
    epochs = [by_picture(epoch) for epoch in digits]
    repeats = [
        (epochs[i][picture], epochs[j][picture])
        for i, j in ((0, 1), (1, 2), (0, 2))
        for picture in epochs[0].keys() & epochs[j].keys() & epochs[i].keys()
    ]
    for what, both in (("neighbours", neighbours), ("epochs", repeats)):
        alike = 0.2**2 + 0.8**2
        assert_share([a.image_first == b.image_first for a, b in both], alike, what)
        worded = [(a, b) for a, b in both if a.caption and b.caption]
        same = [wording(tokenizer, a) == wording(tokenizer, b) for a, b in worded]
        assert_share(same, 0.25, what)


def test_every_epoch_has_all_pictures_in_another_order(digits):
    rows = [[frozenset(pair.picture for pair in row) for row in epoch] for epoch in digits]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert set(rows[i]) == set(rows[j])
        same_place = np.mean([a == b for a, b in zip(rows[i], rows[j], strict=True)])
        assert same_place < 0.02


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """A prepared data set of latents, by an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("latents")
    rng, config = np.random.default_rng(0), autoencoder_config.tiny()
    weights = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32) / max(np.prod(x.shape[:-1]), 4) ** 0.5,
        nnx.to_pure_dict(abstract_autoencoder(config)[1]),
    )
    save_codec(root / "autoencoder", config, weights, 1.0, 0.0)
    (root / "photos").mkdir()
    lines = []
    for n in range(24):
        picture = PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        picture.save(root / "photos" / f"{n}.png")
        lines.append(json.dumps({"file": f"{n}.png", "caption": f"photo {'abcdefgh'[n % 8]} {n}"}))
    (root / "photos" / "captions.jsonl").write_text("\n".join(lines))
    preparation = Preparation(
        (str(root / "photos"),),
        height=16,
        width=16,
        autoencoder=str(root / "autoencoder"),
        vocab_size=300,
        held_out=0.0,
    )
    prepare(preparation, root / "out", None, False, 1, [].append)
    return root / "out"


def test_latents_are_sampled_anew_in_every_epoch(latents, experiment):
    """Pictures told apart by their captions, each of which has a latent of every epoch."""
    data = DataConfig(sources=(SourceConfig(str(latents)),), row_length=96, batch_rows=4)
    experiment = replace(experiment, image=open_dataset(latents).image_config(), data=data)
    epochs = epochs_of(Data(experiment, open_dataset(latents).tokenizer))
    found: dict[tuple, list[np.ndarray]] = {}
    for pair in (pair for epoch in epochs for row in epoch for pair in row):
        found.setdefault(pair.caption, []).append(pair.latent)
    several = [x for caption, x in found.items() if caption and len(x) > 1]
    assert len(found) == 25 and len(several) > 20  # 24 captions, and none where it was dropped
    first, second = (np.stack([x[n] for x in several]) for n in (0, 1))
    assert (first != second).all()
    # The differences are independent from one picture, and one element, to the next.
    difference = (second - first) / (second - first).std(axis=0)
    assert_uncorrelated(difference[1:], difference[:-1], "pictures")
    assert_uncorrelated(difference[..., 1:, :, :], difference[..., :-1, :, :], "elements")


# What generation draws.

TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A model whose every next token has the same distribution, in closed form."""
    experiment = tiny.small(timestep="after")
    sampler = replace(experiment.sampler, temperature=TEMPERATURE, max_tokens=8, kind="ddpm")
    plan = tiny.planned(experiment)
    parameters = tiny.random_parameters(plan)
    blocks = parameters["transformer"]["blocks"]
    for part, name in (("attention", "out_NHD"), ("mlp", "down_FD")):
        blocks[part][name] = jnp.zeros_like(blocks[part][name])
    parameters["embedding_VD"] = jnp.ones_like(parameters["embedding_VD"])
    output = 2 * parameters["output_DV"]
    likeliest = (parameters["transformer"]["norm"]["scale"] @ output)[: tiny.TOKENIZER.boi].argmax()
    parameters["output_DV"] = output.at[:, tiny.TOKENIZER.boi].set(output[:, likeliest])
    return Engine(replace(experiment, sampler=sampler), tiny.TOKENIZER, plan.graph, parameters)


def probabilities(engine: Engine) -> np.ndarray:
    """Of every next token."""
    scale, output = (
        engine.parameters["transformer"]["norm"]["scale"],
        engine.parameters["output_DV"],
    )
    logits = np.asarray(scale, np.float64) @ np.asarray(output, np.float64) / TEMPERATURE
    logits[[tiny.TOKENIZER.bos, tiny.TOKENIZER.eoi, *range(tiny.TOKENIZER.size, 44)]] = -np.inf
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def first_token(spans: list) -> int:
    if not spans:
        return tiny.TOKENIZER.eos
    return int(spans[0].split()[0]) if isinstance(spans[0], str) else tiny.TOKENIZER.boi


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        x == y if isinstance(x, str) and isinstance(y, str) else np.array_equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.long
def test_rows_of_one_request_are_independent_draws(engine):
    rows = 400
    spans = engine.generate([("5",)] * rows, seed=1)
    expected = rows * probabilities(engine)
    counts = np.bincount([first_token(x) for x in spans], minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    often = expected > 4
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 15 and chi_square < often.sum() + 5 * np.sqrt(2 * often.sum()), chi_square

    # A row's tokens are independent as well.
    ids = [list(map(int, x[0].split())) for x in spans if x and isinstance(x[0], str)]
    text = probabilities(engine)[: tiny.TOKENIZER.boi].copy()
    text[tiny.TOKENIZER.eos] = 0
    text /= text.sum()
    assert_share([x[0] == x[1] for x in ids if len(x) > 1], (text**2).sum(), "successive tokens")

    pictures = [x for row in spans for x in row if not isinstance(x, str)]
    assert len(pictures) > 20 and len({x.tobytes() for x in pictures}) == len(pictures)

    again = engine.generate([("5",)] * rows, seed=1)
    assert all(same(a, b) for a, b in zip(spans, again, strict=True))
    other = engine.generate([("5",)] * rows, seed=2)
    alike = [first_token(a) == first_token(b) for a, b in zip(spans, other, strict=True)]
    assert_share(alike, (probabilities(engine) ** 2).sum(), "seeds")
