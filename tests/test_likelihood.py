"""Likelihoods: of all held-out rows and no others, every timestep, a bounded number."""

import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from fake_engine import FakeEngine
from flax import nnx

from transfusion_jax.config import DiffusionConfig, SourceConfig
from transfusion_jax.data.pipeline import Data
from transfusion_jax.diffusion.process import process
from transfusion_jax.evaluation.likelihood import bucket_edges, likelihood, row_losses

CONTEXT_TIMESTEP = 7  # of the experiment's sampler


class TellsLosses(nnx.Module):
    """With the weights of a model that diffuses images."""

    def weights(self, batch):
        return {"text": batch.text_weight_BL, "image": batch.image_weight_BM}


class TellsTargets(TellsLosses):
    """A text loss by the target's id, more where images are not clean or seen at another timestep
    than finished ones; an image loss of t."""

    def losses(self, batch, noise, vocab_chunk):
        seen = process(DiffusionConfig()).corrupt(
            batch.latents_BMhwc, noise.noise_BMhwc, noise.t_BM
        )
        disturbed = jnp.abs(seen - batch.latents_BMhwc).max() > 1e-5
        disturbed |= (noise.t_BM != CONTEXT_TIMESTEP).any()
        return {
            "text": loss_of(batch.text_target_BL).astype(jnp.float32) + jnp.where(disturbed, 1, 0),
            "image": noise.t_BM.astype(jnp.float32),
        }


class TellsTheLastTimestep(TellsLosses):
    """An image loss of 1 at timestep 24, else 0."""

    def losses(self, batch, noise, vocab_chunk):
        return {"text": batch.text_weight_BL, "image": (noise.t_BM == 24).astype(jnp.float32)}


class TellsLimits(TellsLosses):
    """An image loss of 1 at timesteps that training does not draw, else 0."""

    def losses(self, batch, noise, vocab_chunk):
        above = (noise.t_BM >= batch.image_limit_BM).astype(jnp.float32)
        return {"text": batch.text_weight_BL, "image": above}


def loss_of(target_BL):
    """A loss that differs between most targets."""
    return target_BL * 37 % 101 / 20


def perplexity(experiment, tokenizer, split: str) -> float:
    """What `TellsTargets` comes to over all rows of a split."""
    loss = weight = 0.0
    for batch in Data(experiment, tokenizer, split).once(1):
        loss += (loss_of(batch.text_target_BL) * batch.text_weight_BL).sum()
        weight += batch.text_weight_BL.sum()
    return float(np.exp(loss / weight))


@pytest.fixture
def measure_likelihood(tokenizer, tmp_path):
    def measure(experiment, rows=None, model=TellsTargets) -> dict:
        graph = nnx.split(model())[0]
        return likelihood(FakeEngine(experiment, tokenizer, None, graph=graph), tmp_path, rows)

    return measure


def test_likelihood_is_of_all_held_out_text_and_of_clean_images(
    experiment, tokenizer, measure_likelihood
):
    found = measure_likelihood(experiment)["text_perplexity"]
    assert found == pytest.approx(perplexity(experiment, tokenizer, "held_out"), rel=1e-5)
    assert abs(found - perplexity(experiment, tokenizer, "train")) > 1e-3 * found


def test_a_bound_on_rows_is_kept_and_said(experiment, tokenizer, measure_likelihood):
    total = sum(map(len, Data(experiment, tokenizer, "held_out").sources))
    every = measure_likelihood(experiment)
    assert every["likelihood_rows"] == total
    assert measure_likelihood(experiment, total + 1) == every
    some = measure_likelihood(experiment, 20)
    assert some["likelihood_rows"] == 20
    assert some["text_perplexity"] != every["text_perplexity"]
    assert some["text_perplexity"] == pytest.approx(every["text_perplexity"], rel=0.1)
    assert set(some["image_loss_by_timestep"]) == set(every["image_loss_by_timestep"])


def test_a_bound_on_rows_takes_some_of_every_part(experiment, tokenizer):
    text = replace(experiment, data=replace(experiment.data, sources=(SourceConfig("sums"),)))
    data = Data(text, tokenizer, "train")
    rows = [batch.tokens_BL[0] for batch in data.once(1)]
    chosen = np.concatenate([batch.tokens_BL for batch in data.once(4, 7)])
    places = [int(len(rows) * (i + 0.5) / 7) for i in range(7)]
    np.testing.assert_array_equal(chosen[:7], [rows[place] for place in places])
    assert len(chosen) == 8 and not chosen[7].any()

    data = Data(experiment, tokenizer, "held_out")  # digits, then sums
    images = [
        (batch.image_start_BM < experiment.data.row_length).any() for batch in data.once(1, 51)
    ]
    share = len(data.sources[0]) / sum(map(len, data.sources))
    assert abs(np.mean(images) - share) <= 1 / 51 and not all(images)


class TellsDraws(TellsLosses):
    """An image loss of the timestep and of the noise."""

    def losses(self, batch, noise, vocab_chunk):
        drawn_BM = noise.noise_BMhwc[..., 0, 0, 0]
        return {"text": batch.text_weight_BL, "image": drawn_BM + noise.t_BM / 1000}


def test_a_likelihood_does_not_depend_on_seed_or_batch(experiment, measure_likelihood, monkeypatch):
    alone = measure_likelihood(experiment, 24, TellsDraws)["image_loss_by_timestep"]
    seeded = replace(experiment, train=replace(experiment.train, seed=7))
    assert measure_likelihood(seeded, 24, TellsDraws)["image_loss_by_timestep"] == alone
    monkeypatch.setattr("transfusion_jax.evaluation.likelihood.BATCH", 5)
    by_five = measure_likelihood(experiment, 24, TellsDraws)["image_loss_by_timestep"]
    assert by_five == pytest.approx(alone, rel=1e-5)


def test_what_a_row_draws_is_its_own_however_many_are_measured(experiment, tokenizer):
    graph = nnx.split(TellsDraws())[0]
    losses = row_losses(FakeEngine(experiment, tokenizer, None, graph=graph))
    data = Data(experiment, tokenizer, "held_out")

    def drawn(most, size):
        return {
            tuple(number.tolist()): image.tolist()
            for batch, numbers in data.numbered(size, range(len(data.sources)), most)
            for number, image in zip(numbers, losses(batch, numbers)["image"][0], strict=True)
            if sum(image)
        }

    every, some = drawn(None, 16), drawn(20, 8)
    assert 5 < len(some) < len(every) and len(set(map(tuple, every.values()))) == len(every)
    for number, found in some.items():
        assert found == pytest.approx(every[number], rel=1e-5)


def test_images_count_at_the_timesteps_that_training_draws(experiment, measure_likelihood):
    """Those that something follows, up to their noise limit."""
    diffusion = DiffusionConfig(steps=25, noise_limit=10)
    limited = replace(experiment, diffusion=diffusion)
    assert measure_likelihood(limited, model=TellsLimits)["image_loss"] == 0
    data = replace(experiment.data, image_first=1.0)
    first = measure_likelihood(replace(limited, data=data))
    assert list(first["image_loss_by_timestep"]) == ["0-1", "2-4", "5-6", "7-9"]
    assert first["image_loss"] == pytest.approx(4.25, abs=0.1)


@pytest.mark.parametrize("steps", [1000, 25, 13, 10, 4, 2])
def test_buckets_cover_every_timestep_once(steps):
    edges = bucket_edges(steps)
    covered = [t for low, high in itertools.pairwise(edges) for t in range(low, high)]
    assert covered == list(range(steps))
    sizes = np.diff(edges)
    assert len(sizes) == min(10, steps) and sizes.max() - sizes.min() <= 1


def test_every_timestep_is_measured_in_its_bucket(experiment, measure_likelihood):
    experiment = replace(experiment, diffusion=DiffusionConfig(steps=25, noise_limit=10))
    measured = measure_likelihood(experiment)
    found = measured["image_loss_by_timestep"]
    assert measured["image_loss"] == pytest.approx(np.mean(list(found.values())))
    assert list(found) == [
        "0-1", "2-4", "5-6", "7-9", "10-11", "12-14", "15-16", "17-19", "20-21", "22-24",
    ]  # fmt: skip
    for name, mean in found.items():
        low, high = map(int, name.split("-"))
        assert low < mean < high and mean == pytest.approx((low + high) / 2, abs=0.2)

    *others, last = measure_likelihood(experiment, model=TellsTheLastTimestep)[
        "image_loss_by_timestep"
    ].values()
    assert not any(others) and last == pytest.approx(1 / 3, abs=0.1)


def test_a_thousand_timesteps_are_ten_hundreds(experiment, measure_likelihood):
    names = list(measure_likelihood(experiment)["image_loss_by_timestep"])
    assert names == [f"{low}-{low + 99}" for low in range(0, 1000, 100)]
