"""Spread within a class and distance from training pictures: closed forms, and cheats."""

import numpy as np
import pytest

from transfusion_jax.data.sources.digits import load
from transfusion_jax.evaluation.variety import Pictures, variety
from transfusion_jax.metrics.diversity import BLOCK, nearest_distances, within_class_spread

RNG = np.random.default_rng(0)


def pictures(*values: float) -> np.ndarray:
    """Pictures of 2x2x1 of these constant values."""
    return np.asarray(values, np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)


def test_spread_is_the_deviation_within_a_class_and_not_between_classes():
    classes = np.asarray([0, 0, 1, 1])
    # Each class holds c - 1 and c + 1: a standard deviation of sqrt(2) with n - 1.
    assert within_class_spread(pictures(-1, 1, 99, 101), classes) == pytest.approx(np.sqrt(2))
    assert within_class_spread(pictures(0, 0, 9, 9), classes) == 0
    # Classes count equally, whatever their number of pictures.
    found = within_class_spread(pictures(-1, 1, 5, 5, 5, 5), np.asarray([0, 0, 1, 1, 1, 1]))
    assert found == pytest.approx(np.sqrt(2) / 2)


def test_spread_averages_over_values():
    image = np.zeros((2, 1, 2, 1), np.float32)
    image[:, 0, 0, 0] = -1, 1  # one of two values varies
    assert within_class_spread(image, np.zeros(2)) == pytest.approx(np.sqrt(2) / 2)


def test_spread_of_noise_is_its_deviation_in_classes_of_any_size():
    noise = RNG.normal(3, 0.25, (300, 8, 8, 1)).astype(np.float32)
    for size in (5, 30, 100):
        assert within_class_spread(noise, np.arange(300) // size) == pytest.approx(0.25, rel=0.07)


def test_classes_of_one_picture_say_nothing():
    assert within_class_spread(pictures(-1, 1, 50), np.asarray([0, 0, 1])) == pytest.approx(2**0.5)
    assert within_class_spread(pictures(1, 2), np.asarray([0, 1])) is None
    assert within_class_spread(np.zeros(0), np.zeros(0)) is None


def test_spread_of_the_real_digits():
    """0.322 with n in place of n - 1, in the 297 held-out digits: about 30 of each."""
    assert within_class_spread(*load("held_out")) == pytest.approx(0.322, rel=0.02)


def test_distance_is_root_mean_square_to_the_nearest():
    references = pictures(-1, 0, 1)
    found = nearest_distances(pictures(0.9, -0.25, 5.0), references)
    np.testing.assert_allclose(found, [0.1, 0.25, 4.0], rtol=1e-6)
    half = np.zeros((1, 2, 2, 1), np.float32)
    half[0, 0] = 1  # half of the values differ by 1
    np.testing.assert_allclose(nearest_distances(half, pictures(0)), [np.sqrt(0.5)])


def test_distance_equals_that_to_every_reference_also_over_several_blocks():
    references = RNG.normal(0, 1, (2 * BLOCK + 5, 3, 3, 2)).astype(np.float32)
    asked = RNG.normal(0, 1, (7, 3, 3, 2)).astype(np.float32)
    all_pairs = np.sqrt(((asked[:, None] - references[None]) ** 2).mean((2, 3, 4)))
    np.testing.assert_allclose(nearest_distances(asked, references), all_pairs.min(1), rtol=1e-5)
    np.testing.assert_array_equal(nearest_distances(references[::400], references), 0)


def test_variety_tells_cheats_from_real_pictures():
    train, labels = load("train")
    held_out = Pictures(*load("held_out"))
    real = variety(held_out, held_out, train)
    assert real["drawn_spread"] == real["real_spread"] > 0.3
    assert real["nearest_training_drawn"] == real["nearest_training_held_out"] > 0.1
    assert real["training_pictures"] == 1500

    copies = variety(Pictures(train[:200], labels[:200]), held_out, train)
    assert copies["nearest_training_drawn"] == 0 < copies["nearest_training_held_out"]
    assert copies["drawn_spread"] > 0.3

    one_of_each = [held_out.images[list(held_out.classes).index(label)] for label in range(10)]
    same = variety(Pictures(one_of_each * 20, list(range(10)) * 20), held_out, train)
    assert same["drawn_spread"] == 0 and same["real_spread"] == real["real_spread"]


def test_variety_without_pictures_is_unknown():
    real = Pictures(pictures(0, 1), [0, 0])
    none = variety(Pictures([None, None], [0, 0]), real, pictures(0, 1))
    assert (none["drawn_spread"], none["nearest_training_drawn"]) == (None, None)
    assert none["real_spread"] > 0 and none["nearest_training_held_out"] == 0
    # Those that did not come are left out, and their classes with them.
    some = variety(Pictures([None, *pictures(0, 1, 7)], [0, 1, 1, 0]), real, pictures(0, 1))
    assert some["drawn_spread"] == pytest.approx(0.5**0.5)
    assert some["nearest_training_drawn"] == pytest.approx(2.0)
    assert variety(real, real, pictures())["nearest_training_drawn"] is None
