from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.diffusion.process import process
from transfusion_jax.diffusion.sampler import sampler
from transfusion_jax.generation.engine import Engine
from transfusion_jax.model.transfusion import build


@pytest.fixture(scope="module")
def engine(experiment, tokenizer):
    """A random model that is fond of BOI after "draw" and talks otherwise."""
    net = build(experiment, 3)
    net.patches.out_DZ[...] = 0.3 * jax.random.normal(jax.random.key(1), net.patches.out_DZ.shape)
    graph, parameters = nnx.split(net, nnx.Param)
    return Engine(experiment, tokenizer, graph, nnx.to_pure_dict(parameters))


def liking(engine, token, amount=1.0):
    """The engine with a token made likelier everywhere: hidden states are pushed to a direction that it reads."""
    parameters = jax.tree.map(jnp.asarray, engine.parameters)
    output = parameters["output_DV"].at[:, token].set(amount)
    embedding = parameters["embedding_VD"] + 1.0
    return replace(
        engine, parameters={**parameters, "output_DV": output, "embedding_VD": embedding}
    )


def uncached(engine, spans):
    """Hidden states, logits and predictions of an unfinished document, run whole as in training."""
    document = sequence(Document(tuple(spans)), engine.tokenizer, engine.experiment.image.patches)
    row = pack([(document, 0, len(document.tokens))], 96, engine.experiment.image)
    batch = jax.tree.map(jnp.asarray, stack([row]))
    model = nnx.merge(engine.graph, engine.parameters)
    t = jnp.full_like(batch.image_start_BM, engine.experiment.sampler.context_timestep)
    hidden, _ = model(batch, batch.latents_BMhwc, t)
    return model.logits(hidden)[0, len(document.tokens) - 1]


def test_greedy_text_is_the_argmax_of_the_uncached_model(engine):
    prompts = ["three plus four is", "a", "the sum of one and"]
    engine = engine.using(max_tokens=6)
    got = engine.generate([(p,) for p in prompts])
    tokenizer = engine.tokenizer
    for prompt, spans in zip(prompts, got, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        prompt_length = len(ids)
        while len(ids) < prompt_length + 6:
            logits = np.array(uncached(engine, [Text(ids)]))
            logits[
                [tokenizer.bos, tokenizer.boi, tokenizer.eoi]
            ] = -np.inf  # no room for an image in 6 positions
            token = int(logits[: tokenizer.size].argmax())
            if token == tokenizer.eos:
                break
            ids.append(token)
        expected = tokenizer.decode(ids[prompt_length:])
        assert spans == ([expected] if expected else [])


def test_an_image_in_the_prompt_is_seen_as_in_training(engine, experiment):
    image = np.random.default_rng(0).uniform(-1, 1, experiment.image.shape).astype(np.float32)
    rows = engine.using(max_tokens=1)
    batch, length = rows._prompts([(image, "the digit")])
    keys = jax.random.split(jax.random.key(0), 1)
    got = rows._prefill(rows.parameters, batch, length, keys, capacity=64).logits_BV[0]
    spans = [
        Text([engine.tokenizer.bos]),
        Image(image, 1),
        Text(engine.tokenizer.encode("the digit")),
    ]
    np.testing.assert_allclose(got, uncached(engine, spans), atol=1e-4)


def test_a_drawn_image_equals_denoising_with_the_whole_uncached_sequence(
    engine, experiment, tokenizer
):
    """Cached denoising in place, guidance included, is the textbook loop over the full sequence."""
    drawing = liking(engine, tokenizer.boi)
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
        conditional, unconditional = (
            predict_after(before, x, t),
            predict_after([tokenizer.bos], x, t),
        )
        return unconditional + experiment.sampler.guidance * (conditional - unconditional)

    def noise(i):
        return jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(key, length), i), experiment.image.shape
        )

    steps = sampler(experiment.sampler, diffusion)
    np.testing.assert_allclose(
        spans[0], steps.sample(noise(steps.steps), predict, noise), atol=1e-4
    )


def test_text_and_images_alternate_until_the_budget(engine, tokenizer):
    drawing = liking(engine, tokenizer.boi).using(max_tokens=45)
    spans = drawing.generate([("a",), ("three plus",)])
    for request in spans:
        # BOI is barred where an image has no room left, so what follows two images of 18 positions is text.
        assert [type(s) for s in request[:2]] == [np.ndarray, np.ndarray]
        assert sum(isinstance(s, np.ndarray) for s in request) == 2


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


def test_seeds_and_settings_matter(engine, tokenizer):
    drawing = liking(engine, tokenizer.boi).using(max_tokens=20)
    image = lambda e, seed=0: e.generate([("a",)], seed)[0][0]  # noqa: E731
    np.testing.assert_array_equal(image(drawing), image(drawing))
    assert np.abs(image(drawing) - image(drawing, 1)).max() > 0.01
    assert np.abs(image(drawing) - image(drawing.using(guidance=1.0))).max() > 1e-4
    assert np.abs(image(drawing) - image(drawing.using(steps=2))).max() > 1e-4
    with pytest.raises(ValueError, match=r"sampler\.steps=2000"):
        engine.using(steps=2000)
    with pytest.raises(ValueError, match="more than data.row_length=96"):
        engine.check([("zebra " * 100,)])
