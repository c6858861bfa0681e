"""Several images drawn, and that kept behind which the model finds its text likeliest."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_engine import liking, random_engine, uncached

from transfusion_jax.config import SamplerConfig
from transfusion_jax.data.documents import Image, Text
from transfusion_jax.generation import images
from transfusion_jax.generation.guidance import guidance
from transfusion_jax.generation.reading import text_likelihood
from transfusion_jax.generation.rows import IMAGE, TEXT, feed


@pytest.fixture(scope="module")
def engine(experiment, tokenizer):
    return random_engine(experiment, tokenizer)


def in_image(engine, requests):
    """Rows that have read their requests and BOI."""
    batch, length = engine._read(requests)
    keys = jax.random.split(jax.random.key(0), len(requests))
    options = {"capacity": 96, "boi": engine.tokenizer.boi}
    return engine._start(engine.parameters, batch, length, keys, **options)


def model_of(engine):
    return nnx.merge(engine.graph, engine.parameters)


def behind(engine, spans, ids):
    """Log-likelihood of tokens and an end behind a document's spans, by uncached models."""
    total = 0.0
    for i, token in enumerate([*ids, engine.tokenizer.eos]):
        logits = uncached(engine, [*spans, Text(ids[:i])] if i else spans)
        total += float(jax.nn.log_softmax(jnp.asarray(logits))[token])
    return total


def test_a_text_is_read_behind_the_image_and_all_that_was_shown(engine, experiment):
    """As the uncached model reads it, its end included; nothing is read for a row without a text,
    or for one that is not drawing."""
    rng = np.random.default_rng(0)
    picture, *candidates = rng.uniform(-1, 1, (6, *experiment.image.shape)).astype(np.float32)
    texts = ["a handwritten three", "one plus", "", "the", "a"]
    requests = [(texts[0],), (picture, texts[1]), (), (texts[3],), (picture, picture, texts[4])]
    rows, tokenizer = in_image(engine, requests), engine.tokenizer
    rows = rows._replace(status_B=rows.status_B.at[3].set(TEXT))
    image_Bhwc = jnp.stack([jnp.asarray(x) for x in candidates])
    found = text_likelihood(model_of(engine), rows, image_Bhwc, experiment, tokenizer)
    for row in (0, 1, 4):
        shown = [span for span in requests[row] if not isinstance(span, str)]
        drawn = [Image(x, 1) for x in (*shown, candidates[row])]
        expected = behind(engine, [Text([tokenizer.bos]), *drawn], tokenizer.encode(texts[row]))
        assert float(found[row]) == pytest.approx(expected, abs=1e-3)
    assert float(found[2]) == float(found[3]) == 0


def test_a_text_of_the_models_own_is_read_and_one_before_an_image_is_not(engine, experiment):
    """`a` was asked for, `plus one` written; then an image, `three`, and the next."""
    tokenizer, model = engine.tokenizer, model_of(engine)
    written, three = tokenizer.encode("plus one"), tokenizer.encode("three")
    rng = np.random.default_rng(1)
    first, second = rng.uniform(-1, 1, (2, *experiment.image.shape)).astype(np.float32)

    def said(rows, tokens):
        for token in tokens:
            advance_B = jnp.ones((1,), bool)
            rows = feed(model, rows, jnp.full((1,), token), advance_B=advance_B)
        return rows._replace(status_B=jnp.full((1,), IMAGE))

    rows = in_image(engine, [("a",)])
    rows = said(rows._replace(length_B=rows.length_B - 1), [*written, tokenizer.boi])
    ids = [*tokenizer.encode("a"), *written]
    found = text_likelihood(model, rows, jnp.asarray(first)[None], experiment, tokenizer)
    expected = behind(engine, [Text([tokenizer.bos]), Image(first, 1)], ids)
    assert float(found[0]) == pytest.approx(expected, abs=1e-3)

    rows, drawn = engine._draw_images(engine.parameters, rows)
    rows = said(rows, [*three, tokenizer.boi])
    found = text_likelihood(model, rows, jnp.asarray(second)[None], experiment, tokenizer)
    before = [Text([tokenizer.bos, *ids]), Image(np.asarray(drawn[0]), 1), Image(second, 1)]
    assert float(found[0]) == pytest.approx(behind(engine, before, three), abs=1e-3)


@pytest.mark.parametrize("broken", [(), (0,), (1, 3), (4,), (0, 1, 2, 3)])
def test_each_row_keeps_its_likeliest_candidate(engine, monkeypatch, broken):
    """The first of equals; one whose likelihood is no number, only where there is no other."""
    rows, count = in_image(engine, [("a",), ("three plus",), ("the",)]), 5
    keys = [jax.vmap(jax.random.fold_in, (0, None))(rows.place_key_B, k) for k in range(count)]

    def draw(context, guidance, sampling, key_B):
        return jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 1)))(key_B)

    def likelihood(model, rows, image_Bhwc, *settings):
        value_B = jnp.floor(5 * image_Bhwc[:, 0, 0, 0])
        for k in broken:
            value_B = jnp.where((image_Bhwc == candidates[k]).all((1, 2, 3)), jnp.nan, value_B)
        return value_B

    candidates = np.stack([draw(None, None, None, key_B) for key_B in keys])  # [K, B, 8, 8, 1]
    likelihoods = np.floor(5 * candidates[:, :, 0, 0, 0])
    likelihoods[list(broken), :] = np.nan
    monkeypatch.setattr(images, "text_likelihood", likelihood)
    asked = engine.using(candidates=count, guidance=1.0).experiment
    best = images._best(SimpleNamespace(draw=draw), rows, asked, engine.tokenizer)
    for row in range(3):
        np.testing.assert_array_equal(best[row], candidates[np.nanargmax(likelihoods[:, row]), row])


@pytest.mark.long
def test_more_candidates_are_never_less_likely(engine):
    """In the engine's own phase."""
    drawing = liking(engine, engine.tokenizer.boi)
    rows, found = in_image(drawing, [("a handwritten three",), ("one plus",), ("the",)]), []
    for count in (2, 6):
        asked = drawing.using(candidates=count)
        _, kept = asked._draw_images(asked.parameters, jax.tree.map(jnp.copy, rows))
        settings = kept, asked.experiment, engine.tokenizer
        found.append(text_likelihood(model_of(asked), rows, *settings))
    assert (np.diff(found, axis=0) >= -1e-4).all() and (found[-1] > found[0] + 1e-3).any()


def test_one_candidate_is_drawn_and_not_read(engine, monkeypatch):
    """It is what the row's own key draws."""
    monkeypatch.setattr(images, "text_likelihood", None)
    rows, model = in_image(engine, [("a",), ("three plus",)]), model_of(engine)
    experiment, tokenizer = engine.experiment, engine.tokenizer
    _, drawn = images.draw_images(model, rows, experiment=experiment, tokenizer=tokenizer)
    empty = guidance(model, rows, experiment, tokenizer)
    expected = model.draw(rows.context, empty, experiment.sampler, rows.place_key_B)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_bad_counts_of_candidates_are_refused(count):
    with pytest.raises(ValueError, match=rf"sampler.candidates={count} must be in 1..1,024"):
        SamplerConfig(candidates=count)
