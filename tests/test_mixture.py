"""The mixture: shares of the sources, phases, and the order of the rows of each source."""

import numpy as np
import pytest

from transfusion_jax.config import DataConfig, PhaseConfig, SourceConfig
from transfusion_jax.data.mixture import Mixture, first_step


def mixture(weights, phases=(), steps=100, batch_rows=8) -> Mixture:
    """Phases are (start, weights)."""
    sources = tuple(SourceConfig(f"source_{i}", weight) for i, weight in enumerate(weights))
    phases = tuple(PhaseConfig(start, tuple(later)) for start, later in phases)
    return Mixture(DataConfig(sources=sources, phases=phases, batch_rows=batch_rows), steps)


def shares(weights) -> np.ndarray:
    return np.asarray(weights) / sum(weights)


def random_case(seed: int):
    """Weights, phases, the row at which each begins, and their mixture."""
    rng = np.random.default_rng(seed)
    sources, phases = int(rng.integers(1, 6)), int(rng.integers(0, 4))
    weights = rng.lognormal(0, 1.5, (phases + 1, sources)) * (
        rng.random((phases + 1, sources)) < 0.8
    )
    weights[:, rng.integers(sources)] += 0.1  # no phase without a source
    weights[0] += 1e-3 * (weights.sum(0) == 0)  # and no source without a phase
    starts = np.sort(rng.choice(np.arange(1, 100), phases, replace=False))
    later = [
        (start / 100, w.tolist()) for start, w in zip(starts.tolist(), weights[1:], strict=True)
    ]
    rows = [0, *(8 * starts).tolist(), 1200]
    return weights, rows, mixture(weights[0].tolist(), later)


@pytest.mark.parametrize("seed", range(30))
def test_every_prefix_of_a_phase_has_its_shares_and_no_row_is_skipped_or_repeated(seed):
    weights, rows, mixed = random_case(seed)
    picked = [mixed[row] for row in range(rows[-1])]
    source, index = np.asarray(picked).T
    for number in range(weights.shape[1]):
        np.testing.assert_array_equal(index[source == number], np.arange((source == number).sum()))
    taken = source[:, None] == np.arange(weights.shape[1])
    for phase, (begin, end) in enumerate(zip(rows[:-1], rows[1:], strict=True)):
        got = np.cumsum(taken[begin:end], axis=0)
        wanted = np.arange(1, end - begin + 1)[:, None] * shares(weights[phase])
        assert np.abs(got - wanted).max() < (1 if (weights[phase] > 0).sum() <= 3 else 1.5)
        assert not got[-1][weights[phase] == 0].any()
    for row in (0, 1, 7, *rows, 1199):
        np.testing.assert_array_equal(mixed.counts(row), taken[:row].sum(0))


def test_rows_of_two_sources_interleave():
    assert [mixture((2, 1))[row] for row in range(6)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (0, 2),
        (1, 1),
        (0, 3),
    ]


def test_a_phase_begins_at_its_step():
    mixed = mixture((1, 0), [(0.25, (0, 1)), (0.505, (1, 0))], steps=100, batch_rows=8)
    source = np.asarray([mixed[row][0] for row in range(800)])
    np.testing.assert_array_equal(np.flatnonzero(source), np.arange(25 * 8, 51 * 8))
    assert mixed[51 * 8] == (0, 25 * 8)


@pytest.mark.parametrize("steps", [100, 1000, 250_000])
def test_a_phase_at_a_hundredth_of_the_run_begins_at_that_step_exactly(steps):
    """0.07 * 100 is 7.000000000000001 in floating point."""
    begins = [first_step(percent / 100, steps) for percent in range(1, 100)]
    assert begins == [percent * steps // 100 for percent in range(1, 100)]
    assert first_step(1 / 3, 300) == first_step(0.1 + 0.2, 10) + 97 == 100
    assert first_step(0.501, 10) == 6  # between two steps: the later one


def test_one_source_is_read_in_order():
    mixed = mixture((0.3,))
    assert [mixed[row] for row in (0, 1, 10**6, 10**12)] == [
        (0, 0),
        (0, 1),
        (0, 10**6),
        (0, 10**12),
    ]


def test_shares_hold_after_billions_of_rows():
    weights = (0.5, 0.3, 0.15, 0.05)
    mixed, at = mixture(weights), 3 * 10**9
    before = mixed.counts(at)
    assert np.abs(before - at * shares(weights)).max() < 1.5
    for row in range(at, at + 2000):
        source, index = mixed[row]
        assert index == before[source]
        before[source] += 1
    np.testing.assert_array_equal(mixed.counts(at + 2000), before)
