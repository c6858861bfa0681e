"""The suite `scenes`: right answers score one, every cheat is found out; no model is run."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import FakeEngine

from transfusion_jax.config import Experiment, ImageConfig
from transfusion_jax.data.sources.scenes.judge import holds, judge, parse
from transfusion_jax.data.sources.scenes.scene import COLOURS, Object, Scene, render
from transfusion_jax.data.sources.scenes.source import NOVEL_PAIRS, Pair, examples, pictures
from transfusion_jax.data.sources.scenes.words import Edit, captions
from transfusion_jax.evaluation import scenes as suite
from transfusion_jax.evaluation.scene_prompts import PROMPTS, prompts

COUNT = 10
PLACES = tuple(itertools.product(range(3), repeat=2))
GENEVAL = (
    "single_object",
    "two_objects",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)
VARIETY = {
    "drawn_spread",
    "real_spread",
    "nearest_training_drawn",
    "nearest_training_held_out",
    "training_pictures",
}


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(suite, "TRAINING", 300)
    monkeypatch.setattr(suite, "HELD_OUT", 300)


class Oracle:
    """Right answers, after `spoil` has changed the scenes of its pictures."""

    def __init__(self, spoil=lambda scene: scene):
        self.spoil = spoil
        self.edits = {(e.scene, e.instruction): e.target for e in examples("held_out", Edit, COUNT)}
        self.turn = itertools.count()

    def draw(self, prompt: str) -> list:
        return [render(self.spoil(self.scene(prompt)), 32)]

    def read(self, image: np.ndarray) -> list:
        return [captions(judge(image))[0]]

    def edit(self, image: np.ndarray, instruction: str) -> list:
        return [render(self.spoil(self.edits[judge(image), instruction]), 32)]

    def scene(self, prompt: str) -> Scene:
        """Some scene of which the prompt is true; what it leaves open has a new colour each
        time."""
        colour = list(COLOURS)[next(self.turn) % len(COLOURS)]
        things = [
            (item.kind, item.colour or colour, item.size or "large")
            for item in parse(prompt).items
            for _ in range(item.count)
        ]
        for places in itertools.permutations(PLACES, len(things)):
            found = Scene(tuple(Object(*x, place) for x, place in zip(things, places, strict=True)))
            if holds(parse(prompt), found):
                return found


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Scores of the suite for an engine that draws, reads and edits by these functions."""
    monkeypatch.setattr(suite, "scenes_grid", lambda *_: None)

    def scores(draw=None, read=None, edit=None) -> dict:
        oracle = Oracle()
        draw, read, edit = draw or oracle.draw, read or oracle.read, edit or oracle.edit

        def answer(first, *rest):
            if isinstance(first, str):
                return draw(first)
            return edit(first, *rest) if rest else read(first)

        return suite.scenes(engine(answer), tmp_path, None, count=COUNT)

    return scores


def engine(answer) -> FakeEngine:
    return FakeEngine(Experiment("x", image=ImageConfig(32, 32, 3, patch=4)), None, answer)


def drawn(scores: dict) -> dict[str, float]:
    """The shares of drawings that are right, by category."""
    return {
        **{name: scores[f"geneval_{name}"] for name in GENEVAL},
        "compositional": scores["compositional"],
    }


def test_right_answers_score_one(tmp_path):
    oracle = Oracle()

    def answer(first, *rest):
        if isinstance(first, str):
            return oracle.draw(first)
        return oracle.edit(first, *rest) if rest else oracle.read(first)

    asked = engine(answer)
    scores = suite.scenes(asked, tmp_path, None, count=COUNT)
    assert (tmp_path / "scenes.png").stat().st_size > 10_000
    assert scores.pop("drawing_residual") < 1e-6
    variety = {name: scores.pop(name) for name in VARIETY}
    assert set(scores) == {f"geneval_{name}" for name in (*GENEVAL, "overall")} | {
        "compositional",
        "caption_accuracy",
        "compositional_caption_accuracy",
        "edit_accuracy",
        "judge_accuracy",
    }
    assert set(scores.values()) == {1.0}
    assert variety["training_pictures"] == 300
    assert 0 < variety["drawn_spread"] < variety["real_spread"]  # places and sizes do not vary
    assert min(variety.values()) > 0


def test_captions_are_greedy_and_pictures_drawn_as_the_run_says(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "scenes_grid", lambda *_: None)
    experiment = Experiment("x", image=ImageConfig(32, 32, 3, patch=4))
    sampler = replace(experiment.sampler, temperature=0.7, guidance=2.5)
    asked = FakeEngine(replace(experiment, sampler=sampler), None, lambda *_: [])
    suite.scenes(asked, tmp_path, None, count=3)
    assert [call.draws for call in asked.calls] == [True] * len(PROMPTS) + [False, False, True]
    assert all(call.draw == call.draws for call in asked.calls)
    for call in asked.calls:
        assert call.sampler == (sampler if call.draws else replace(sampler, temperature=0.0))


def changed(**attributes):
    return lambda scene: Scene(tuple(replace(o, **attributes) for o in scene.objects))


def crowded(scene):
    free = next(place for place in PLACES if scene.at(place) is None)
    return scene.plus(Object("ring", "purple", "small", free))


def turned(scene):
    return Scene(tuple(replace(o, place=(2 - o.place[0], 2 - o.place[1])) for o in scene.objects))


@pytest.mark.parametrize(
    "spoil, wrong",
    [
        (lambda scene: Scene(()), {*GENEVAL, "compositional", "edit"}),
        (crowded, {*GENEVAL, "compositional", "edit"}),
        (
            changed(kind="ring", colour="purple"),
            {"two_objects", "position", "colour_attribution", "compositional"},
        ),
        (turned, {"position", "edit"}),
    ],
    ids=["nothing", "too many", "all the same", "turned"],
)
def test_wrong_pictures_score_low(spoil, wrong, measure):
    oracle = Oracle(spoil)
    scores = measure(draw=oracle.draw, edit=oracle.edit)
    shares = drawn(scores) | {"edit": scores["edit_accuracy"]}
    assert {name for name, share in shares.items() if share == 0} >= wrong
    if spoil is turned:
        assert shares["single_object"] == shares["counting"] == shares["colour_attribution"] == 1
    expected = np.mean([shares[name] for name in GENEVAL])
    assert scores["geneval_overall"] == pytest.approx(expected)
    assert scores["caption_accuracy"] == 1


def test_answers_that_are_no_answers_score_zero(measure):
    scores = measure(
        draw=lambda prompt: [],
        read=lambda image: ["a purple zebra \x1f $\\zebra$ \u3042"],
        edit=lambda image, instruction: [],
    )
    for name in ("drawing_residual", "drawn_spread", "nearest_training_drawn"):
        assert scores.pop(name) is None
    assert scores.pop("judge_accuracy") == 1
    assert {value for name, value in scores.items() if name not in VARIETY} == {0.0}


def test_odd_answers_are_shown_all_the_same(tmp_path):
    answers = {
        "caption": [suite.Answer(None, "a purple zebra \x1f $\\zebra$ \u3042", False)],
        "edit": [suite.Answer(np.ones((32, 65, 3), np.float32), "x" * 400, True)] * 20,
    }
    suite.scenes_grid(answers, tmp_path / "scenes.png")
    assert (tmp_path / "scenes.png").stat().st_size > 1000


def test_missing_drawings_count_as_wrong(measure):
    oracle, turn = Oracle(), itertools.count()

    def half(*request):
        draw = oracle.draw if len(request) == 1 else oracle.edit
        return draw(*request) if next(turn) % 2 else []

    scores = measure(draw=half, edit=half)
    assert set(drawn(scores).values()) == {0.5} and scores["edit_accuracy"] == 0.5


def test_text_beside_a_picture_counts_as_wrong(measure):
    oracle = Oracle()
    for beside in (
        lambda answer: ["here it is", *answer],
        lambda answer: [*answer, "here it is"],
        lambda answer: answer * 2,
    ):
        scores = measure(
            draw=lambda prompt, beside=beside: beside(oracle.draw(prompt)),
            edit=lambda *request, beside=beside: beside(oracle.edit(*request)),
        )
        assert set(drawn(scores).values()) == {0} and scores["edit_accuracy"] == 0


@pytest.mark.long
def test_captions_are_true_and_alone(measure):
    oracle = Oracle()
    right = lambda image: oracle.read(image)[0]  # noqa: E731
    for wrong in (
        lambda image: [right(image) + " on a table"],
        lambda image: [right(image) + ", a red circle"],
        lambda image: [right(image), image],
        lambda image: [image, right(image)],
        lambda image: [right(image)] * 2,
        lambda image: [],
    ):
        scores = measure(read=wrong)
        assert scores["caption_accuracy"] == scores["compositional_caption_accuracy"] == 0


def test_edits_that_change_nothing_or_repeat_the_target_of_another_are_wrong(measure):
    assert measure(edit=lambda image, instruction: [image])["edit_accuracy"] == 0
    target = render(examples("held_out", Edit, 1)[0].target, 32)
    scores = measure(edit=lambda image, instruction: [target])
    assert scores["edit_accuracy"] == pytest.approx(1 / COUNT)


@pytest.mark.long
def test_always_the_same_picture_is_found_out(measure):
    picture = render(Scene((Object("circle", "red", "large", (1, 1)),)), 32)
    scores = measure(draw=lambda prompt: [picture])
    assert max(drawn(scores).values()) < 0.5 and scores["drawn_spread"] == 0 < scores["real_spread"]
    kept = {}
    scores = measure(draw=lambda prompt: kept.setdefault(prompt, Oracle().draw(prompt)))
    assert scores["geneval_overall"] == 1 and scores["drawn_spread"] == 0


def test_answers_of_training_are_found_out(measure):
    trained = [render(pair.scene, 32) for pair in examples("train", Pair, 100)]
    known = {image.tobytes() for image in trained}
    oracle = Oracle()

    def read(image):
        return oracle.read(image) if image.tobytes() in known else ["a red circle"]

    copies = itertools.cycle(pictures("train", range(100), 32))
    scores = measure(draw=lambda prompt: [next(copies)], read=read)
    assert scores["nearest_training_drawn"] == 0 < scores["nearest_training_held_out"]
    assert scores["geneval_overall"] < 0.5 and scores["caption_accuracy"] < 0.5


def test_prompts_can_be_met_and_keep_to_the_pairs_of_training():
    for category in PROMPTS:
        asked = prompts(category, 60)
        assert asked == prompts(category, 60) and len(set(asked)) >= 6
        novel = [
            any((i.colour, i.kind) in NOVEL_PAIRS for i in parse(prompt).items) for prompt in asked
        ]
        assert all(novel) if category == "compositional" else not any(novel)
