import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    SourceConfig,
)
from transfusion_jax.data.documents import Image, Text, sequence
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.sources.scenes.judge import holds, judge, parse, residual
from transfusion_jax.data.sources.scenes.scene import COLOURS, KINDS, SIZES, Object, Scene, render
from transfusion_jax.data.sources.scenes.source import (
    COUNTS,
    NOVEL_PAIRS,
    Pair,
    Scenes,
    _belongs,
    example,
    examples,
    pictures,
)
from transfusion_jax.data.sources.scenes.words import BESIDE, DIRECTIONS, Edit, captions
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer


def of(side: int) -> Experiment:
    """Of a run on scenes, with a noise limit and nothing dropped."""
    return Experiment(
        name="scenes",
        image=ImageConfig(side, side, 3, patch=4),
        data=DataConfig(caption_dropout=0.0),
        diffusion=DiffusionConfig(noise_limit=500),
    )


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
            f"\njudge exact at {side}: noise {noisy}; blur {soft}; "
            f"noise 0.1 and blur 0.75 {both}; shifted {moved}"
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


def test_three_captions_of_four_relate_two_things_that_can_be_told_apart():
    related, count = 0, 0
    for pair in examples("train", Pair, 2000):
        if len(pair.scene.objects) == 2 and len({o.kind for o in pair.scene.objects}) == 2:
            claims = list(map(parse, pair.captions))
            related += sum(bool(claim.relations) for claim in claims)
            count += len(claims)
    assert count > 1000 and 0.7 < related / count < 0.8


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
    [
        "",
        "a",
        "a red",
        "two circle",
        "a circles",
        "a circle and",
        "a circle left of",
        "the circle",
        "five circles",
        "a red blue circle",
        "a circle a star",
        "a picture of",
        "zebra",
        "a circle and a star!",
        "there is",
    ],
)
def test_other_text_is_no_caption(text):
    assert parse(text) is None


def test_claims_say_what_the_words_say():
    red, blue = Object("circle", "red", "large", (0, 0)), Object("star", "blue", "small", (1, 2))
    scene = Scene((red, blue))
    for true in (
        "a circle and a star",
        "a big red circle above a little star",
        "a star to the right of a circle",
        "there is a circle over a star",
        "one star and one circle",
    ):
        assert holds(parse(true), scene), true
    for false in (
        "a circle",
        "two circles",
        "a blue circle and a star",
        "a circle below a star",
        "a red star and a blue circle",
        "a small circle and a star",
        "a star left of a circle",
        "a circle, a star and a ring",
    ):
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
    """An instruction read by other code: the kind of edit, and the objects expected after it."""
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
    source = Scenes(replace(of(32), data=DataConfig(caption_dropout=0.3)), split)
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
    for index in range(240):
        found = example("train", index)
        (document,) = source.documents([index], words, np.random.default_rng(index))
        images = [span for span in document.spans if isinstance(span, Image)]
        text = words.decode(
            i for span in document.spans if isinstance(span, Text) for i in span.ids
        )
        np.testing.assert_array_equal(images[0].latent_hwc, pictures("train", [index], side)[0])
        kinds[type(found)] += 1
        if isinstance(found, Pair):
            assert len(images) == 1 and text in found.captions
        else:
            assert text == found.instruction and judge(images[1].latent_hwc) == found.target
            order = [type(span) for span in document.spans]
            kinds[len(order)] += 1
            if len(order) == 4:  # what was done
                assert order == [Text, Image, Image, Text]
                assert [i.noise_limit for i in images] == [500, 500]
            else:
                assert order == [Text, Image, Text, Image, Text]
                assert [i.noise_limit for i in images] == [500, 1000]
    assert min(kinds[Pair], kinds[4], kinds[5]) > 2


@pytest.mark.long
def test_scene_edits_are_edits_alone(words):
    data = DataConfig(sources=(SourceConfig("scene_edits"),), caption_dropout=0.0)
    experiment = replace(of(32), data=data)
    for split in ("train", "held_out"):
        (source,) = load_sources(experiment, split)
        for document in source.documents(range(40), words, np.random.default_rng(0)):
            images = [span for span in document.spans if isinstance(span, Image)]
            assert [type(x) for x in document.spans] == [Text, Image, Text, Image, Text]
            before, after = (judge(image.latent_hwc) for image in images)
            assert before != after and all(_belongs(s, split) for s in (before, after))
        assert source.lengths(words)[:40].min() > 2 * experiment.image.span


def test_edits_lose_their_instruction_or_all_that_comes_before(words):
    data = DataConfig(caption_dropout=1.0, image_first=0.0)
    source = Scenes(replace(of(32), data=data), "train")
    edit = next(i for i in itertools.count() if isinstance(example("train", i), Edit))
    target = render(example("train", edit).target, 32)
    counts = Counter()
    for document in source.documents([edit] * 400, words, np.random.default_rng(0)):
        images = [span for span in document.spans if isinstance(span, Image)]
        np.testing.assert_array_equal(images[-1].latent_hwc, target)
        assert images[-1].noise_limit == 1000
        assert sequence(document, words, source.experiment.image.patches).weight.sum() == 0
        counts[len(images), len(document.spans)] += 1
    assert set(counts) == {(1, 3), (2, 4)} and min(counts.values()) > 150


def test_what_was_done_is_said_behind_both_pictures(words):
    """All of it is learned, in as many documents as pairs that begin with their picture."""
    data = DataConfig(caption_dropout=1.0, image_first=0.3)
    source = Scenes(replace(of(32), data=data), "train")
    edit = next(i for i in itertools.count() if isinstance(example("train", i), Edit))
    documents = source.documents([edit] * 500, words, np.random.default_rng(0))
    said = [d for d in documents if len(d.spans[-1].ids) > 1]
    assert len(said) / 500 == pytest.approx(0.3, abs=0.06)  # three standard errors
    ids = words.encode(example("train", edit).instruction)
    for document in said:
        row = sequence(document, words, source.experiment.image.patches)
        assert row.weight.sum() == 2 + len(ids) + 1  # two images that begin, words, the end
        assert document.spans[-1].ids == [*ids, words.eos]


@pytest.mark.parametrize(
    "image", [ImageConfig(32, 32, 1, 2), ImageConfig(64, 32, 3, 2), ImageConfig(48, 48, 3, 2)]
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match="scenes are pictures of 32x32x3 or 64x64x3, image says"):
        Scenes(replace(of(32), image=image), "train")
