"""Suites fed with engines that cheat in each way that a score could miss; no model is run."""

import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import FakeEngine

from transfusion_jax.config import DataConfig, SourceConfig
from transfusion_jax.data.documents import text_document
from transfusion_jax.data.sources import comparisons as comparisons_source
from transfusion_jax.data.sources import digits as source
from transfusion_jax.data.sources import sums as sums_source
from transfusion_jax.data.sources.registry import SOURCES
from transfusion_jax.evaluation import digits as digits_suite
from transfusion_jax.evaluation import pairs as pairs_suite
from transfusion_jax.evaluation.comparisons import comparisons
from transfusion_jax.evaluation.digits import digits
from transfusion_jax.evaluation.pairs import pairs
from transfusion_jax.evaluation.suite import SUITES, check_experiment, check_suites, evaluate
from transfusion_jax.evaluation.sums import sums
from transfusion_jax.generation.engine import Engine

BLANK = np.zeros((8, 8, 1), np.float32)


def test_the_fake_engine_answers_as_the_real_one_is_asked():
    for name in ("generate", "using", "picture", "image", "read", "check"):
        real, fake = (inspect.signature(getattr(kind, name)) for kind in (Engine, FakeEngine))
        assert list(real.parameters) == list(fake.parameters), name
    fields = {field for kind in (Engine,) for field in kind.__dataclass_fields__}
    assert {"experiment", "tokenizer", "graph", "parameters"} <= fields
    assert isinstance(Engine.picture_shape, property)


# Digits


class KnowsDigits:
    """Draws digits as pictures of a split that the judge recognises, in turn; captions those."""

    def __init__(self, split: str = "held_out"):
        self.images, self.labels = source.load(split)
        self.seen = digits_suite.judge()[0].predict(self.images.reshape(len(self.images), -1))
        self.of = {
            label: itertools.cycle(self.images[(self.labels == label) & (self.seen == label)])
            for label in range(10)
        }
        self.label = {
            image.tobytes(): label for image, label in zip(self.images, self.labels, strict=True)
        }

    def draw(self, caption: str) -> list:
        return [next(self.of[source.label_of(caption)])]

    def read(self, image: np.ndarray) -> list:
        label = self.label.get(image.tobytes())
        return [] if label is None else [source.captions(label)[1]]

    def __call__(self, asked) -> list:
        return self.draw(asked) if isinstance(asked, str) else self.read(asked)


@pytest.fixture
def measure_digits(experiment, tmp_path, monkeypatch):
    """Scores of the suite `digits` for an engine that draws and reads by these functions."""
    monkeypatch.setattr(digits_suite, "digits_grid", lambda *_: None)
    knows = KnowsDigits()

    def measure(draw=knows.draw, read=knows.read) -> dict:
        def answer(asked):
            return draw(asked) if isinstance(asked, str) else read(asked)

        return digits(FakeEngine(experiment, None, answer), tmp_path, None)

    return measure


def test_right_digits_score_one(experiment, tmp_path):
    knows = KnowsDigits()
    scores = digits(FakeEngine(experiment, None, knows), tmp_path, None)
    assert scores["generation_accuracy"] == scores["caption_accuracy"] == 1
    assert scores["classifier_accuracy"] == pytest.approx((knows.seen == knows.labels).mean())
    assert 0.98 < scores["classifier_accuracy"] < 1
    assert scores["drawn_spread"] == pytest.approx(scores["real_spread"], rel=0.05)
    assert scores["nearest_training_drawn"] > 0.8 * scores["nearest_training_held_out"] > 0.1
    assert scores["training_pictures"] == 1500
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_missing_drawings_count_as_wrong(measure_digits):
    knows, turn = KnowsDigits(), itertools.count()
    scores = measure_digits(draw=lambda c: knows.draw(c) if next(turn) % 5 < 2 else [])
    assert scores["generation_accuracy"] == pytest.approx(0.4)
    scores = measure_digits(draw=lambda c: ["a picture of it"])
    assert scores["generation_accuracy"] == 0
    assert scores["drawn_spread"] is scores["nearest_training_drawn"] is None
    assert scores["real_spread"] > 0.3
    broken = itertools.cycle([np.nan, np.inf, 0.0, 0.0])
    scores = measure_digits(draw=lambda c: [x + np.float32(next(broken)) for x in knows.draw(c)])
    assert scores["generation_accuracy"] == pytest.approx(0.5)


def test_drawings_with_text_beside_them_count_as_wrong(measure_digits):
    knows = KnowsDigits()
    for beside in (
        lambda c: [c, *knows.draw(c)],
        lambda c: [*knows.draw(c), c],
        lambda c: knows.draw(c) * 2,
    ):
        assert measure_digits(draw=beside)["generation_accuracy"] == 0


def test_always_the_same_picture_is_found_out(measure_digits):
    knows = KnowsDigits()
    seven = knows.draw("the digit seven")
    assert measure_digits(draw=lambda c: seven)["generation_accuracy"] == pytest.approx(0.1)
    of_each = {label: knows.draw(f"the digit {source.NUMBERS[label]}") for label in range(10)}
    scores = measure_digits(draw=lambda c: of_each[source.label_of(c)])
    assert scores["generation_accuracy"] == 1 and scores["drawn_spread"] == 0


def test_copies_of_training_pictures_are_found_out(measure_digits):
    scores = measure_digits(draw=KnowsDigits("train").draw)
    assert scores["generation_accuracy"] == 1
    assert scores["nearest_training_drawn"] == 0 < scores["nearest_training_held_out"]


def test_drawings_are_judged_within_the_range_of_pictures(measure_digits):
    knows = KnowsDigits()
    scores = measure_digits(draw=lambda c: [5 * picture for picture in knows.draw(c)])
    assert scores["nearest_training_drawn"] < 1


def test_captions_are_right_to_the_letter_and_alone(measure_digits):
    knows = KnowsDigits()
    right = lambda image: knows.read(image)[0]  # noqa: E731
    for wrong in (
        lambda image: [right(image) + " and more"],
        lambda image: [right(image) + " "],
        lambda image: ["the digit seven"] * 2,
        lambda image: [right(image), image],
        lambda image: [image, right(image)],
        lambda image: [image],
        lambda image: [""],
        lambda image: [],
        KnowsDigits("train").read,  # knows what training showed, and nothing else
    ):
        assert measure_digits(read=wrong)["caption_accuracy"] == 0
    share = (knows.labels == 7).mean()
    scores = measure_digits(read=lambda image: [c for c in knows.read(image) if "seven" in c])
    assert scores["caption_accuracy"] == pytest.approx(share)  # the others did not come
    scores = measure_digits(read=lambda image: ["a handwritten seven"])
    assert scores["caption_accuracy"] == pytest.approx(share)


# Sums and comparisons


@pytest.mark.parametrize(
    ("suite", "problems", "name"),
    [
        (sums, sums_source.problems, "text_accuracy"),
        (comparisons, comparisons_source.problems, "comparison_accuracy"),
    ],
)
def test_answers_are_right_to_the_letter_and_each_split_by_itself(
    suite, problems, name, experiment, tmp_path
):
    def measure(answer) -> tuple[float, float]:
        scores = suite(FakeEngine(experiment, None, answer), tmp_path, None)
        assert set(scores) == {name, f"{name}_held_out"}
        return scores[name], scores[f"{name}_held_out"]

    known = {split: dict(problems(split)) for split in ("train", "held_out")}
    every = known["train"] | known["held_out"]
    assert measure(lambda p: [every[p]]) == (1, 1)
    assert measure(lambda p: [known["train"].get(p, "")]) == (1, 0)
    assert measure(lambda p: [known["held_out"].get(p, "")]) == (0, 1)
    for wrong in (
        lambda p: [every[p] + " and more"],
        lambda p: [every[p], BLANK],
        lambda p: [BLANK, every[p]],
        lambda p: [f"{p} {every[p]}"],
        lambda p: [],
        lambda p: [""],
    ):
        assert measure(wrong) == (0, 0)


# Pairs


@pytest.fixture
def measure_pairs(experiment, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_suite, "pairs_grid", lambda *_: None)

    def measure(answer, experiment=experiment) -> dict:
        return pairs(FakeEngine(experiment, tokenizer, answer), tmp_path, None)

    return measure


def test_pairs_are_held_out_and_shown(experiment, tokenizer, tmp_path):
    engine = FakeEngine(experiment, tokenizer, KnowsDigits())
    scores = pairs(engine, tmp_path, None)
    assert scores["drawn_share"] == 1 and scores["pairs_training_pictures"] == 1500
    assert scores["pairs_drawn_spread"] > 0.2 and scores["pairs_nearest_training_drawn"] > 0.1
    held_out = {image.tobytes() for image in source.load("held_out")[0]}
    asked, shown = engine.calls
    assert len(shown.requests) == len(asked.requests) == pairs_suite.SHOWN
    assert {image.tobytes() for (image,) in shown.requests} <= held_out
    assert (tmp_path / "pairs.png").stat().st_size > 10_000


def test_pairs_find_missing_repeated_and_copied_pictures(measure_pairs):
    knows, turn = KnowsDigits(), itertools.count()
    none = measure_pairs(lambda asked: ["", "nothing"] if isinstance(asked, str) else [])
    assert none["drawn_share"] == 0 and none["pairs_drawn_spread"] is None
    half = measure_pairs(lambda asked: knows(asked) if next(turn) % 2 else [])
    assert half["drawn_share"] == 0.5
    same = measure_pairs(lambda asked: [BLANK])
    assert same["drawn_share"] == 1 and same["pairs_drawn_spread"] == 0 < same["pairs_real_spread"]
    copied = measure_pairs(KnowsDigits("train"))
    assert copied["pairs_nearest_training_drawn"] == 0 < copied["pairs_nearest_training_held_out"]


def test_pairs_take_what_is_no_picture_for_none_and_others_within_their_range(measure_pairs):
    knows, turn = KnowsDigits(), itertools.count()
    broken = [np.full_like(BLANK, np.nan)]
    half = measure_pairs(lambda asked: knows(asked) if next(turn) % 2 else broken)
    assert half["drawn_share"] == 0.5
    assert all(np.isfinite(value) for value in half.values())
    far = measure_pairs(
        lambda asked: [5 * span for span in knows.draw(asked)] if isinstance(asked, str) else []
    )
    assert far["pairs_nearest_training_drawn"] < 1


class Twice(FakeEngine):
    """Its images are half of the pictures, and what is encoded is rounded."""

    def picture(self, image_hwc):
        return 2 * image_hwc

    def image(self, picture_HWC):
        return np.round(picture_HWC) / 2


def test_latents_of_pairs_are_those_of_pictures(experiment, tokenizer, tmp_path, monkeypatch):
    """Of drawn ones as of held-out ones."""
    compared = []
    monkeypatch.setattr(pairs_suite, "pairs_grid", lambda *_: None)
    monkeypatch.setattr(pairs_suite, "variety", lambda *parts: compared.extend(parts) or {})
    answer = lambda asked: [np.full_like(BLANK, 0.9)]  # noqa: E731
    pairs(Twice(experiment, tokenizer, answer), tmp_path, None)
    drawn, held_out, _ = compared
    for part in (drawn, held_out):
        assert {float(x) % 0.5 for x in np.ravel(part.images)} == {0.0}


def test_pairs_read_a_bounded_number_of_documents(experiment, measure_pairs, monkeypatch):
    monkeypatch.setattr(pairs_suite, "COMPARED", 100)
    monkeypatch.setattr(pairs_suite, "LOOKED_AT", 30)
    assert measure_pairs(KnowsDigits())["pairs_training_pictures"] == 50  # of two sources, half
    sources = (SourceConfig("sums"), SourceConfig("digits"))
    text_first = replace(experiment, data=replace(experiment.data, sources=sources))
    scores = measure_pairs(KnowsDigits(), text_first)  # the 36 held-out sums are not looked through
    assert scores["drawn_share"] == 1 and scores["pairs_training_pictures"] == 100


class TextThenDigits(source.Digits):
    """The digits, after 40 documents of text."""

    def __init__(self, experiment, split):
        super().__init__(experiment, split)
        self.splittable = np.arange(40 + len(self.images)) < 40

    def lengths(self, tokenizer):
        return np.concatenate([np.full(40, 3), super().lengths(tokenizer)])

    def documents(self, indices, tokenizer, rng):
        return [
            super(TextThenDigits, self).documents([i - 40], tokenizer, rng)[0]
            if i >= 40
            else text_document(tokenizer.encode("a"), tokenizer)
            for i in indices
        ]


def test_pairs_are_found_behind_text(experiment, measure_pairs, monkeypatch):
    monkeypatch.setattr(pairs_suite, "LOOKED_AT", 30)
    monkeypatch.setitem(SOURCES, "mixed", TextThenDigits)
    data = replace(experiment.data, sources=(SourceConfig("mixed"),))
    scores = measure_pairs(KnowsDigits(), replace(experiment, data=data))
    assert scores["drawn_share"] == 1 and scores["pairs_training_pictures"] == 1500


def test_without_pairs_there_is_nothing_to_say(experiment, measure_pairs):
    text = replace(experiment, data=DataConfig(sources=(SourceConfig("sums"),), row_length=96))
    assert measure_pairs(None, text) == {}


# All suites


def test_captions_are_greedy_and_pictures_drawn_as_the_run_says(
    experiment, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(pairs_suite, "pairs_grid", lambda *_: None)
    monkeypatch.setattr(digits_suite, "digits_grid", lambda *_: None)
    sampler = replace(experiment.sampler, temperature=0.7, guidance=2.5, steps=3)
    experiment = replace(experiment, sampler=sampler)
    every = dict(sums_source.problems("train") + sums_source.problems("held_out"))
    knows = KnowsDigits()
    engine = FakeEngine(
        experiment, tokenizer, lambda asked: [every[asked]] if str(asked) in every else knows(asked)
    )
    scores = evaluate(engine, ("digits", "pairs"), tmp_path, print)
    assert scores["generation_accuracy"] == scores["caption_accuracy"] == 1
    assert [call.draws for call in engine.calls] == [True, False, True, False]
    for call in engine.calls:
        assert call.sampler == (sampler if call.draws else replace(sampler, temperature=0.0))
    engine.calls.clear()
    assert evaluate(engine, ("sums",), tmp_path, print)["text_accuracy_held_out"] == 1
    assert [call.sampler.temperature for call in engine.calls] == [0, 0]


def test_suites_of_one_model_name_their_metrics_apart(experiment, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_suite, "COMPARED", 20)
    monkeypatch.setattr(pairs_suite, "pairs_grid", lambda *_: None)
    monkeypatch.setattr(digits_suite, "digits_grid", lambda *_: None)
    every, knows = (
        dict(sums_source.problems("train") + sums_source.problems("held_out")),
        KnowsDigits(),
    )
    engine = FakeEngine(
        experiment, tokenizer, lambda asked: [every[asked]] if str(asked) in every else knows(asked)
    )
    names = ("digits", "sums", "pairs")
    apart = [set(SUITES[name].measure(engine, tmp_path, None)) for name in names]
    said = []
    together = evaluate(engine, names, tmp_path, said.append)
    assert len(together) == 1 + sum(map(len, apart)) and together["parameters"] == 0
    assert said == [f"evaluating: {name}" for name in names]


def test_suites_that_cannot_measure_a_model_say_so_before_they_begin(experiment, tokenizer):
    engine = FakeEngine(experiment, tokenizer, None)
    check_suites(engine, ("digits", "sums", "likelihood", "pairs"))
    with pytest.raises(ValueError, match="'fid' is not one of"):
        check_suites(engine, ("fid",))
    expected = "suite 'scenes' judges pictures of 32x32x3 or 64x64x3, the model's are 8x8x1"
    with pytest.raises(ValueError, match=expected):
        check_suites(engine, ("digits", "scenes"))
    with pytest.raises(ValueError, match=expected):
        check_experiment(replace(experiment, evaluation=("scenes",)))
    gone = replace(experiment, data=replace(experiment.data, sources=(SourceConfig("gone"),)))
    check_experiment(replace(gone, evaluation=("scenes",)))  # its pictures are not known yet
    check_suites(replace(engine, experiment=gone), ("digits", "sums"))
    for name in ("likelihood", "pairs"):
        with pytest.raises(ValueError, match="'gone' is not one of"):
            check_suites(replace(engine, experiment=gone), (name,))
