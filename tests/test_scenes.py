import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from transfusion_jax.config import Experiment, ImageConfig
from transfusion_jax.data.documents import Image, Text, sequence
from transfusion_jax.data.sources.scenes.judge import holds, judge, parse, residual
from transfusion_jax.data.sources.scenes.scene import COLOURS, KINDS, SIZES, Object, Scene, render
from transfusion_jax.data.sources.scenes.source import (
    COUNTS,
    NOVEL_PAIRS,
    Pair,
    Scenes,
    example,
    examples,
    pictures,
)
from transfusion_jax.data.sources.scenes.words import BESIDE, DIRECTIONS, Edit, captions
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.evaluation import scenes as evaluation


def of(side: int) -> Experiment:
    return Experiment(name="scenes", image=ImageConfig(side, side, 3, patch=4))


@pytest.fixture(scope="module")
def shown() -> list[Scene]:
    """2,000 scenes of all splits, compositional ones first."""
    return [
        example(split, i).scene
        for split in ("compositional", "held_out", "train")
        for i in range(667)
    ][:2000]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer(itertools.islice(Scenes(of(32), "train").texts(), 5000), 500)


def blurred(image: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur with the border's colour outside."""
    reach = int(4 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    for axis in (0, 1):
        padded = np.pad(
            image, [(reach, reach) if i == axis else (0, 0) for i in range(3)], mode="edge"
        )
        views = [np.take(padded, range(i, i + image.shape[axis]), axis) for i in range(len(kernel))]
        image = sum(k * view for k, view in zip(kernel / kernel.sum(), views, strict=True))
    return image


def exactness(scenes: list[Scene], side: int, damage) -> float:
    return float(np.mean([judge(damage(render(scene, side))) == scene for scene in scenes]))


# Pictures and their judge


@pytest.mark.parametrize("side", [32, 64])
def test_pictures_are_plain_and_the_judge_inverts_them(shown, side):
    picture = render(shown[0], side)
    assert (
        picture.shape == (side, side, 3) and picture.dtype == np.float32 and abs(picture).max() <= 1
    )
    assert exactness(shown, side, lambda image: image) >= 0.995
    assert residual(picture) < 1e-6 < residual(np.clip(picture, -0.8, 0.8))


@pytest.mark.parametrize("side", [32, 64])
def test_the_judge_tells_every_object_on_every_place(side):
    """With all else equal, each attribute alone makes the difference."""
    objects = itertools.product(KINDS, COLOURS, SIZES, [(0, 0), (1, 1), (2, 0), (2, 2)])
    alone = [Scene((Object(*attributes),)) for attributes in objects]
    assert [judge(render(scene, side)) for scene in alone] == alone
    assert judge(render(Scene(()), side)) == Scene(())


@pytest.mark.parametrize("side", [32, 64])
def test_the_judge_forgives_noise_and_blur_and_not_everything(shown, side, capsys):
    rng, some, pixel = np.random.default_rng(0), shown[::10], side / 32
    noisy = {
        s: exactness(some, side, lambda x, s=s: x + s * rng.standard_normal(x.shape))
        for s in (0.1, 0.2, 0.3, 1)
    }
    soft = {
        s: exactness(some, side, lambda x, s=s: blurred(x, s * pixel))
        for s in (0.5, 0.75, 1.0, 1.5, 3)
    }
    both = exactness(
        some, side, lambda x: blurred(x, 0.75 * pixel) + 0.1 * rng.standard_normal(x.shape)
    )
    moved = exactness(some, side, lambda x: np.roll(x, (1, -1), (0, 1)))
    with capsys.disabled():
        print(
            f"\njudge exact at {side}: noise {noisy}; blur {soft}; noise 0.1 and blur 0.75 {both}; shifted {moved}"
        )
    assert min(noisy[0.1], noisy[0.2], soft[0.5], soft[0.75], both, moved) >= 0.99
    assert min(noisy[0.3], soft[1.0]) >= 0.95
    assert noisy[1] < 0.6 and soft[3] < 0.1, "such pictures show too little to be read"


# Captions


def test_captions_parse_back_and_are_true_of_their_scene(shown):
    wordings = [(text, scene) for scene in shown[::20] for text in captions(scene)]
    assert len(wordings) > 10_000
    for text, scene in wordings:
        claim = parse(text)
        assert claim is not None and holds(claim, scene), (text, scene)


def contradictions(scene: Scene) -> dict[str, Scene]:
    """Scenes that differ from this one in one respect."""
    free = next(p for p in itertools.product(range(3), repeat=2) if scene.at(p) is None)
    following = {
        name: dict(zip(values, [*values][1:] + [*values][:1], strict=True))
        for name, values in (("kind", KINDS), ("colour", COLOURS), ("size", SIZES))
    }
    return {
        "too many": scene.plus(replace(scene.objects[0], place=free)),
        "too few": scene.without(scene.objects[-1]),
        "mirrored": Scene(
            tuple(replace(o, place=(o.place[0], 2 - o.place[1])) for o in scene.objects)
        ),
        **{
            name: scene.without(scene.objects[0]).plus(
                replace(scene.objects[0], **{name: table[getattr(scene.objects[0], name)]})
            )
            for name, table in following.items()
        },
    }


def test_captions_are_false_of_a_scene_that_contradicts_them(shown):
    """And say nothing of what they leave open."""
    words = {
        "colour": "|".join(COLOURS),
        "size": "small|large|little|big",
        "mirrored": "left of|right of",
    }
    checked = Counter()
    for scene in shown[::40]:
        wrong = contradictions(scene)
        for text in captions(scene):
            claim = parse(text)
            for how, contradiction in wrong.items():
                said = re.search(words.get(how, ""), text) is not None
                if how == "mirrored" and said and len(scene.objects) > 2:
                    continue  # the words may be true of another two
                assert holds(claim, contradiction) != said, (how, text, contradiction)
                checked[how, said] += 1
    assert all(checked[how, True] > 500 for how in wrong)
    assert all(checked[how, False] > 500 for how in words)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a red", "two circle", "a circles", "a circle and", "a circle left of", "the circle", "five circles",
     "a red blue circle", "a circle a star", "a picture of", "zebra", "a circle and a star!", "there is"],
)  # fmt: skip
def test_other_text_is_no_caption(text):
    assert parse(text) is None


def test_claims_say_what_the_words_say():
    red, blue = Object("circle", "red", "large", (0, 0)), Object("star", "blue", "small", (1, 2))
    scene = Scene((red, blue))
    for true in ("a circle and a star", "a big red circle above a little star", "a star to the right of a circle",
                 "there is a circle over a star", "one star and one circle"):  # fmt: skip
        assert holds(parse(true), scene), true
    for false in ("a circle", "two circles", "a blue circle and a star", "a circle below a star",
                  "a red star and a blue circle", "a small circle and a star", "a star left of a circle",
                  "a circle, a star and a ring"):  # fmt: skip
        assert not holds(parse(false), scene), false


# Splits


def pairs_of(found: Pair | Edit) -> set[tuple[str, str]]:
    scenes = [found.scene, found.target] if isinstance(found, Edit) else [found.scene]
    return {(o.colour, o.kind) for scene in scenes for o in scene.objects}


def test_splits_are_disjoint_and_novel_pairs_are_compositional():
    found = {
        split: [example(split, i) for i in range(1000 if split != "train" else 5000)]
        for split in COUNTS
    }
    scenes = {
        split: {
            s for e in group for s in ([e.scene, e.target] if isinstance(e, Edit) else [e.scene])
        }
        for split, group in found.items()
    }
    for one, other in itertools.combinations(COUNTS, 2):
        assert not scenes[one] & scenes[other]
    seen = {split: set().union(*map(pairs_of, group)) for split, group in found.items()}
    every = set(itertools.product(COLOURS, KINDS))
    assert seen["train"] == seen["held_out"] == every - NOVEL_PAIRS
    assert seen["compositional"] == every
    assert {c for c, _ in seen["train"]} == set(COLOURS) and {k for _, k in seen["train"]} == set(
        KINDS
    )
    for scene in scenes["compositional"]:
        assert {(o.colour, o.kind) for o in scene.objects} & NOVEL_PAIRS
    train = found["train"]
    assert {len(e.scene.objects) for e in train} == {1, 2, 3, 4}
    assert 0.13 < np.mean([isinstance(e, Edit) for e in train]) < 0.17
    assert len({text for e in train if isinstance(e, Pair) for text in e.captions}) > 5000


def test_a_document_is_a_function_of_split_and_index():
    assert example("train", 7) == example("train", 7) != example("train", 8)
    assert example("train", 10**9).scene.objects
    with pytest.raises(ValueError, match="'test' of the scenes is not one of"):
        example("test", 0)


# Edits

NOUN = f"(?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(KINDS)})"


def named(scene: Scene, size: str, colour: str, kind: str) -> list[Object]:
    return [
        o
        for o in scene.objects
        if o.kind == kind and size in (None, o.size) and colour in (None, o.colour)
    ]


def shifted(o: Object, step: tuple[int, int]) -> tuple[int, int]:
    return o.place[0] + step[0], o.place[1] + step[1]


def carried_out(edit: Edit) -> tuple[str, set[Object]]:
    """An instruction read with other eyes: the kind of edit, and the objects that there must be after it."""
    before, text = set(edit.scene.objects), edit.instruction
    size, colour, kind = re.search(f"the {NOUN}", text).groups()
    (thing,) = named(edit.scene, size, colour, kind)
    rest = text[re.search(f"the {NOUN}", text).end() :].strip()
    if text.split()[0] in ("remove", "delete", "take", "erase"):
        return "remove", before - {thing}
    if text.split()[0] in ("move", "shift", "push"):
        return "move", before - {thing} | {replace(thing, place=shifted(thing, DIRECTIONS[rest]))}
    if text.split()[0] in ("add", "put", "draw"):
        size, colour, kind, side = re.match(rf"\w+ an? {NOUN} (.+) the ", text).groups()
        return "add", before | {Object(kind, colour, size, shifted(thing, BESIDE[side]))}
    return "recolour", before - {thing} | {replace(thing, colour=rest.removeprefix("to "))}


@pytest.mark.parametrize("split", COUNTS)
def test_edits_change_what_they_say_and_nothing_else(split):
    kinds = Counter()
    for edit in examples(split, Edit, 300):
        kind, after = carried_out(edit)
        kinds[kind] += 1
        assert set(edit.target.objects) == after != set(edit.scene.objects), edit
        assert judge(render(edit.target, 32)) == edit.target
    assert set(kinds) == {"remove", "move", "add", "recolour"} and min(kinds.values()) > 20


# The source


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_lengths_bound_documents(words, split):
    source = Scenes(of(32), split)
    source.count = 400
    lengths, patches = source.lengths(words), source.experiment.image.patches
    reached = np.zeros(400, int)
    for index, seed in itertools.product(range(400), range(8)):
        (document,) = source.documents([index], words, np.random.default_rng(seed))
        reached[index] = max(reached[index], len(sequence(document, words, patches).tokens))
    assert (reached <= lengths).all() and (reached == lengths).mean() > 0.5


@pytest.mark.parametrize("side", [32, 64])
def test_documents_hold_the_pictures_and_words_of_their_example(words, side):
    source = Scenes(of(side), "train")
    kinds = Counter()
    for index in range(60):
        found = example("train", index)
        (document,) = source.documents([index], words, np.random.default_rng(index))
        images = [span for span in document.spans if isinstance(span, Image)]
        text = words.decode(
            i for span in document.spans if isinstance(span, Text) for i in span.ids
        )
        np.testing.assert_array_equal(images[0].latent_hwc, pictures("train", [index], side)[0])
        kinds[type(found)] += 1
        if isinstance(found, Pair):
            assert len(images) == 1 and text in (*found.captions, "")
        else:
            assert [type(span) for span in document.spans] == [Text, Image, Text, Image, Text]
            assert text == found.instruction and judge(images[1].latent_hwc) == found.target
            assert [i.noise_limit for i in images] == [
                source.experiment.diffusion.noise_limit,
                1000,
            ]
    assert min(kinds[Pair], kinds[Edit]) > 3


@pytest.mark.parametrize(
    "image", [ImageConfig(32, 32, 1, 2), ImageConfig(64, 32, 3, 2), ImageConfig(48, 48, 3, 2)]
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match="scenes are pictures of 32x32x3 or 64x64x3, image says"):
        Scenes(replace(of(32), image=image), "train")


# Scores


class Oracle:
    """Answers every request rightly, then lets `spoil` change the scenes of its pictures."""

    def __init__(self, spoil=lambda scene: scene, caption=lambda scene: captions(scene)[0]):
        self.picture_shape, self.spoil, self.caption = (32, 32, 3), spoil, caption
        self.edits = {(e.scene, e.instruction): e.target for e in examples("held_out", Edit, 10)}

    def using(self, **changes):
        assert changes == {"temperature": 0.0}
        return self

    def generate(self, requests, seed=0):
        return [self.answer(*request) for request in requests]

    def answer(self, first, instruction=None):
        if isinstance(first, str):
            return [render(self.spoil(self.scene(first)), 32)]
        if instruction is None:
            return [self.caption(judge(first))]
        return [render(self.spoil(self.edits[judge(first), instruction]), 32)]

    def scene(self, prompt):
        """Some scene of which the prompt is true."""
        claim = parse(prompt)
        things = [
            (i.kind, i.colour or "blue", i.size or "large")
            for i in claim.items
            for _ in range(i.count)
        ]
        for places in itertools.permutations(itertools.product(range(3), repeat=2), len(things)):
            scene = Scene(
                tuple(Object(*thing, place) for thing, place in zip(things, places, strict=True))
            )
            if holds(claim, scene):
                return scene


def changed(**attributes):
    return lambda scene: Scene(tuple(replace(o, **attributes) for o in scene.objects))


def crowded(scene):
    free = next(p for p in itertools.product(range(3), repeat=2) if scene.at(p) is None)
    return scene.plus(Object("ring", "purple", "small", free))


def turned(scene):
    return Scene(tuple(replace(o, place=(2 - o.place[0], 2 - o.place[1])) for o in scene.objects))


CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colours",
    "position",
    "colour_attribution",
)


def test_right_answers_score_one(tmp_path):
    scores = evaluation.scenes(Oracle(), tmp_path, count=10)
    assert set(scores) == {f"geneval_{name}" for name in (*CATEGORIES, "overall")} | {
        "compositional", "caption_accuracy", "compositional_caption_accuracy", "edit_accuracy", "drawing_residual",
        "judge_accuracy",
    }  # fmt: skip
    residual = scores.pop("drawing_residual")
    assert residual < 1e-6 and set(scores.values()) == {1.0}
    assert (tmp_path / "scenes.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "spoil, wrong",
    [
        (lambda scene: Scene(()), {*CATEGORIES, "compositional", "edit"}),
        (crowded, {*CATEGORIES, "compositional", "edit"}),
        (
            changed(kind="ring", colour="purple"),
            {"two_objects", "position", "colour_attribution", "compositional"},
        ),
        (turned, {"position", "edit"}),
    ],
    ids=["nothing", "too many", "all the same", "turned"],
)
def test_wrong_pictures_score_low(spoil, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "figure", lambda *_: None)
    scores = evaluation.scenes(Oracle(spoil), tmp_path, count=10)
    shares = {name: scores.get(f"geneval_{name}") for name in CATEGORIES}
    shares |= {"compositional": scores["compositional"], "edit": scores["edit_accuracy"]}
    assert {name for name, share in shares.items() if share == 0} >= wrong
    if spoil is turned:
        assert shares["single_object"] == shares["counting"] == shares["colour_attribution"] == 1
    assert scores["geneval_overall"] == pytest.approx(
        np.mean([shares[name] for name in CATEGORIES])
    )
    assert scores["caption_accuracy"] == 1


def test_wrong_captions_and_missing_pictures_score_zero(tmp_path):
    class Mute(Oracle):
        def answer(self, first, instruction=None):
            return [] if isinstance(first, str) else ["a purple zebra \x1f $\\zebra$ \u3042"]

    scores = evaluation.scenes(Mute(), tmp_path, count=10)
    assert scores.pop("drawing_residual") is None and scores.pop("judge_accuracy") == 1
    assert set(scores.values()) == {0.0}


def test_prompts_can_be_met_and_keep_to_the_pairs_of_training():
    for category in evaluation.PROMPTS:
        asked = evaluation.prompts(category, 60)
        assert asked == evaluation.prompts(category, 60) and len(set(asked)) >= 6
        novel = [
            any((i.colour, i.kind) in NOVEL_PAIRS for i in parse(prompt).items) for prompt in asked
        ]
        assert all(novel) if category == "compositional" else not any(novel)
