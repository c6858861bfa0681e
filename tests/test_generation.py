import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_engine import liking, random_engine, uncached

from transfusion_jax.config import ImageConfig, MeshConfig, SamplerConfig
from transfusion_jax.config import stored as stored_config
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.diffusion.process import process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.generation.devices import Devices
from transfusion_jax.generation.engine import Engine
from transfusion_jax.generation.rows import DONE, IMAGE, TEXT, Rows, feed
from transfusion_jax.generation.text import choose
from transfusion_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def engine(experiment, tokenizer):
    return random_engine(experiment, tokenizer)


@pytest.fixture(scope="module")
def drawing(engine, tokenizer):
    """A model that begins an image wherever it may; compiled once for all that leave its settings
    alone."""
    return liking(engine, tokenizer.boi)


def test_greedy_text_is_the_argmax_of_the_uncached_model(engine, experiment):
    """BOI is barred exactly where an image has no room."""
    prompts = ["three plus four is", "a", "the sum of one and"]
    budget = experiment.image.span + 1
    got = engine.using(max_tokens=budget).generate([(p,) for p in prompts])
    tokenizer = engine.tokenizer
    for prompt, spans in zip(prompts, got, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        prompt_length = len(ids)
        while (room := prompt_length + budget - len(ids)) > 0:
            logits = np.array(uncached(engine, [Text(ids)]))[: tokenizer.size]
            logits[[tokenizer.bos, tokenizer.eoi]] = -np.inf
            if room < experiment.image.span:
                logits[tokenizer.boi] = -np.inf
            token = int(logits.argmax())
            assert token != tokenizer.boi, "another seed is needed"
            if token == tokenizer.eos:
                break
            ids.append(token)
        expected = tokenizer.decode(ids).removeprefix(prompt)
        assert spans == ([expected] if expected else [])


def prefilled(engine, requests):
    """Rows that have read their requests."""
    batch, length = engine._read(requests)
    keys = jax.random.split(jax.random.key(0), len(requests))
    return engine._start(engine.parameters, batch, length, keys, capacity=96)


def next_logits(engine, rows):
    """Logits [B, V] of the next token of every row."""
    model = nnx.merge(engine.graph, engine.parameters)
    return model.logits(rows.hidden_BD[:, None])[:, 0]


def test_a_prompt_that_is_no_unicode_is_refused(engine):
    with pytest.raises(ValueError, match=r"a text is not valid UTF-8: 'a\\udcff'"):
        engine.check([("a\udcff",)])


def test_an_image_in_the_prompt_is_seen_as_in_training(engine, experiment):
    image = np.random.default_rng(0).uniform(-1, 1, experiment.image.shape).astype(np.float32)
    got = next_logits(engine, prefilled(engine, [(image, "the digit")]))[0]
    spans = [
        Text([engine.tokenizer.bos]),
        Image(image, 1),
        Text(engine.tokenizer.encode("the digit")),
    ]
    np.testing.assert_allclose(got, uncached(engine, spans), atol=1e-4)


def test_a_drawn_image_equals_denoising_with_the_whole_uncached_sequence(
    experiment, tokenizer, drawing
):
    """Cached denoising in place, guidance included, is the textbook loop over the full sequence."""
    prompt, seed = "a handwritten three", 5
    spans = drawing.generate([(prompt,)], seed)[0]
    assert isinstance(spans[0], np.ndarray) and spans[0].shape == experiment.image.shape

    model, diffusion = nnx.merge(drawing.graph, drawing.parameters), process(experiment.diffusion)
    before = [tokenizer.bos, *tokenizer.encode(prompt)]
    key, length = jax.random.fold_in(jax.random.key(seed), 0), len(before) + 1

    def predict_after(ids, x, t):
        document = sequence(
            Document((Text(ids), Image(np.zeros(x.shape), 1))), tokenizer, experiment.image.patches
        )
        row = pack([(document, 0, len(document.tokens))], 96, experiment.image)
        batch = jax.tree.map(jnp.asarray, stack([row]))
        noisy = jnp.zeros_like(batch.latents_BMhwc).at[0, 0].set(x)
        return model(batch, noisy, jnp.full_like(batch.image_start_BM, t))[1][0, 0]

    def predict(x, t):
        conditional = predict_after(before, x, t)
        unconditional = predict_after([tokenizer.bos], x, t)
        return unconditional + experiment.sampler.guidance * (conditional - unconditional)

    def noise(i):
        place = jax.random.fold_in(key, length)
        return jax.random.normal(jax.random.fold_in(place, i), experiment.image.shape)

    steps = sampler(experiment.sampler, diffusion)
    np.testing.assert_allclose(
        spans[0], steps.sample(noise(steps.steps), predict, noise), atol=1e-4
    )


def test_an_answer_can_be_told_to_begin_with_an_image(engine, tokenizer, drawing):
    """A model that would write draws, as one that begins an image by itself does."""
    writing = liking(engine, tokenizer.boi, -1.0)
    requests = [("a handwritten three",), ("one plus",)]
    assert all(isinstance(spans[0], str) for spans in writing.generate(requests, 5) if spans)
    drawn = writing.generate(requests, 5, draw=True)
    assert all(isinstance(spans[0], np.ndarray) for spans in drawn)
    for asked, left in zip(
        drawing.generate(requests, 5, draw=True), drawing.generate(requests, 5), strict=True
    ):
        np.testing.assert_array_equal(asked[0], left[0])


def test_what_follows_a_drawn_image_sees_it_clean_and_closed(tokenizer, drawing):
    """After a drawing the next token's logits are those of a document with that image and EOI, as
    in training; a row that was not drawing is as it was."""
    rows = prefilled(drawing, [("a handwritten three",), ("one plus",)])
    before = rows.hidden_BD[1]
    boi = jnp.full((2,), tokenizer.boi, jnp.int32)
    drew = jnp.asarray([True, False])
    rows = feed_and_mark(drawing, rows, boi, drew)
    rows, images = drawing._draw_images(drawing.parameters, rows)
    prompt = [tokenizer.bos, *tokenizer.encode("a handwritten three")]
    expected = uncached(drawing, [Text(prompt), Image(np.asarray(images[0]), 1)])
    np.testing.assert_allclose(next_logits(drawing, rows)[0], expected, atol=1e-4)
    assert int(rows.length_B[0]) == len(prompt) + drawing.experiment.image.span
    np.testing.assert_array_equal(rows.hidden_BD[1], before)
    assert rows.status_B.tolist() == [TEXT, DONE]
    # And so on from there: the uncached model after one more token.
    token = tokenizer.encode("is")[0]
    rows = feed_and_mark(drawing, rows, jnp.full((2,), token, jnp.int32), drew)
    spans = [Text(prompt), Image(np.asarray(images[0]), 1), Text([token])]
    np.testing.assert_allclose(next_logits(drawing, rows)[0], uncached(drawing, spans), atol=1e-4)


def feed_and_mark(engine, rows, token_B, advance_B):
    """The rows after one more token where `advance` says so, in IMAGE there and DONE elsewhere."""
    rows = feed(nnx.merge(engine.graph, engine.parameters), rows, token_B, advance_B=advance_B)
    return rows._replace(status_B=jnp.where(advance_B, IMAGE, DONE))


def test_text_and_images_alternate_until_the_budget(drawing):
    drawing = drawing.using(max_tokens=45)
    spans = drawing.generate([("a",), ("three plus",)])
    for request in spans:
        # An image takes 18 positions; after two of them BOI is barred, and text follows.
        assert [type(s) for s in request[:2]] == [np.ndarray, np.ndarray]
        assert sum(isinstance(s, np.ndarray) for s in request) == 2


def test_spans_are_streamed_as_they_come(drawing):
    drawing = drawing.using(max_tokens=40)
    requests = [("a",), ("three plus",)]
    streamed = list(drawing.stream(requests, 4))
    assert [row for row, _ in streamed[:4]] == [0, 1, 0, 1]
    for row, expected in enumerate(drawing.generate(requests, 4)):
        spans = [span for number, span in streamed if number == row]
        for got, span in zip(spans, expected, strict=True):
            np.testing.assert_array_equal(got, span)


def test_an_answer_keeps_the_space_between_it_and_a_text(engine, experiment, tokenizer):
    """After an image, shown or drawn, there is none."""
    (plus,) = tokenizer.encode("plus")
    writing = liking(engine, plus).using(max_tokens=experiment.image.span + 1)
    picture = np.zeros(experiment.image.shape, np.float32)
    requests = [("three",), (picture,), (picture, "three"), (picture, ""), ()]
    texts = [text for (text,) in writing.generate(requests)]
    many = " ".join(["plus"] * (experiment.image.span + 1))
    assert texts == [f" {many}", many, f" {many}", many, many]
    assert [spans[1:] for spans in writing.generate(requests, draw=True)] == [["plus"]] * 5


def test_eos_stops_the_text(engine, tokenizer):
    assert liking(engine, tokenizer.eos).generate([("a",), ("three plus four is",)]) == [[], []]


def test_a_request_does_not_depend_on_the_batch_around_it(engine, tokenizer):
    """Alone or among others; sampled text and drawn images alike."""
    for likes in (tokenizer.boi, 300):
        some = liking(engine, likes, 0.05).using(temperature=1.0, max_tokens=20)
        together = some.generate([("a handwritten one",), ("three plus",), ("the",)], seed=9)
        alone = some.generate([("a handwritten one",)], seed=9)
        for got, expected in zip(alone[0], together[0], strict=True):
            if isinstance(got, str):
                assert got == expected
            else:
                np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.long
def test_equal_requests_draw_apart(engine, drawing):
    """Text and images of one batch, and two images of one request, have random numbers of their
    own."""
    drawing = drawing.using(max_tokens=40)
    spans = drawing.generate([("a",)] * 3, seed=1)
    images = [span for request in spans for span in request[:2]]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert np.abs(image - other).max() > 0.05
    writing = engine.using(temperature=1.0)
    texts = [request[0] for request in writing.generate([("three plus",)] * 4, seed=1)]
    assert len(set(map(str, texts))) == 4


@pytest.mark.parametrize("temperature, share", [(0.5, 0.9), (1.0, 0.75), (2.0, 0.634)])
def test_temperature_divides_the_logits(temperature, share):
    """Of two tokens with odds of 3, a share of 3^(1 / T) / (1 + 3^(1 / T)); one key a row."""
    count = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([1.0, 3.0])), (count, 2))
    keys = jax.random.split(jax.random.key(0), count)
    nothing = jnp.zeros((count,), jnp.int32)
    rows = Rows(None, nothing, nothing, nothing, logits, nothing, keys)
    drawn = choose(logits, rows, temperature)
    assert float(drawn.mean()) == pytest.approx(share, abs=0.025)  # four standard errors at most
    later = choose(logits, rows._replace(length_B=nothing + 1), temperature)
    assert 0.05 < float((drawn != later).mean()) < 0.95
    assert (choose(logits, rows, 0) == 1).all()


@pytest.mark.long
def test_seeds_and_settings_matter(engine, drawing):
    drawing = drawing.using(max_tokens=20)

    def image(engine, seed=0):
        return engine.generate([("a",)], seed)[0][0]

    np.testing.assert_array_equal(image(drawing), image(drawing))
    assert np.abs(image(drawing) - image(drawing, 1)).max() > 0.01
    assert np.abs(image(drawing) - image(drawing.using(guidance=1.0))).max() > 1e-4
    assert np.abs(image(drawing) - image(drawing.using(steps=2))).max() > 1e-4
    with pytest.raises(ValueError, match=r"sampler\.steps=2000"):
        engine.using(steps=2000)
    assert engine.check([("a",)]) == 30 + 1 + len(engine.tokenizer.encode("a"))
    with pytest.raises(ValueError, match="more than data.row_length=96"):
        engine.check([("zebra " * 100,)])


@pytest.mark.long
def test_an_image_fits_into_the_least_max_tokens(engine, experiment, drawing):
    """BOI, the patches and EOI; one position less is refused."""
    span = experiment.image.span
    assert span == 18
    (spans,) = drawing.using(max_tokens=span).generate([("a",)])
    assert [type(s) for s in spans] == [np.ndarray]
    line = (
        "sampler.max_tokens=17 has no room for an image: BOI, 16 patches and EOI take 18 positions"
    )
    with pytest.raises(ValueError, match=line):
        engine.using(max_tokens=span - 1)


def test_the_paper_can_draw(experiment):
    assert SamplerConfig().max_tokens > ImageConfig().span == 258


def test_a_stored_experiment_without_room_for_an_image_is_given_it(experiment):
    """As 256 positions and images of 258 once were stored; the line says how to change it."""
    values = json.loads(stored_config.dumps(experiment))
    values["sampler"]["max_tokens"] = 17
    said = []
    loaded = stored_config.loads(json.dumps(values), "runs/old/config.json", report=said.append)
    assert loaded == replace(experiment, sampler=replace(experiment.sampler, max_tokens=18))
    assert said == [
        "runs/old/config.json: sampler.max_tokens=17 has no room for an image, which takes 18 "
        "positions; 18 is used instead, --max-tokens changes it"
    ]
    assert (
        stored_config.loads(stored_config.dumps(experiment), "", report=said.append) == experiment
    )
    assert len(said) == 1


def test_answers_in_groups_are_those_of_one_batch(engine, drawing, monkeypatch):
    """Whatever their number: a cache holds no more rows than there is room for."""
    row_bytes = 2 * 2 * (32 + 40 + 18) * 2 * 16 * 4  # of keys and values of two layers
    prompts = ["a", "three plus", "the digit", "one", "a handwritten three"]
    some, read, sizes = drawing.using(temperature=1.0, max_tokens=40), Engine._answer, []
    at_once = some.generate([(p,) for p in prompts], 6)

    def answer(self, batch, *rest):
        sizes.append(len(batch.tokens_BL))
        return read(self, batch, *rest)

    monkeypatch.setattr(Engine, "_answer", answer)
    monkeypatch.setattr("transfusion_jax.generation.devices.CACHE_BYTES", 3 * row_bytes - 1)
    grouped = some.generate([(p,) for p in prompts], 6)
    assert sizes == [2, 2, 2]
    sizes.clear()
    some.using(candidates=2).generate([(p,) for p in prompts], 6)
    assert sizes == [1] * 5  # each is read on a cache of its own
    assert {type(span) for spans in at_once for span in spans} == {str, np.ndarray}
    for got, expected in zip(grouped, at_once, strict=True):
        for span, other in zip(got, expected, strict=True):
            if isinstance(span, str):
                assert span == other
            else:
                np.testing.assert_allclose(span, other, atol=1e-4)


@pytest.mark.parametrize(
    "count, shards, room, size",
    [(5, 1, 9, 5), (5, 1, 2, 2), (756, 1, 31, 31), (7, 8, 9, 7), (7, 8, 6, 8), (8, 8, 1, 8),
     (9, 8, 1, 8), (17, 8, 9, 24), (100, 4, 8, 28), (1, 4, 0, 1)],
)  # fmt: skip
def test_groups_are_as_large_as_there_is_room_and_equal(count, shards, room, size, monkeypatch):
    mesh = make_mesh(MeshConfig(data=shards), jax.devices()[:shards])
    monkeypatch.setattr("transfusion_jax.generation.devices.CACHE_BYTES", room * 1000 + 999)
    assert Devices(mesh).group(count, 1000) == size


def test_devices_that_know_their_memory_give_caches_a_part_of_it(monkeypatch):
    class Chip:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    chips = [Chip({"bytes_limit": 8000}), Chip({"bytes_limit": 6000})]
    monkeypatch.setattr(jax, "local_devices", lambda: chips)
    assert Devices().cache_bytes() == 1500


def test_a_phase_takes_over_the_cache(drawing):
    """There are not two of them."""
    rows = prefilled(drawing, [("a",)])
    writing, _ = drawing._write_text(drawing.parameters, rows, jnp.asarray([60]), budget=30)
    assert rows.cache.k.is_deleted() and not writing.cache.k.is_deleted()
    drawn, _ = drawing._draw_images(drawing.parameters, writing)
    assert writing.cache.v.is_deleted() and not drawn.cache.v.is_deleted()
