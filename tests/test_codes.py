"""Images as the codes of a VQ autoencoder, from pictures to measures; and models without images."""

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from autoencoder_cases import SMALL, VQ, parameters
from flax import nnx
from PIL import Image
from test_families import experiment as of_family

from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.batch import Batch
from transfusion_jax.commands.experiments import override
from transfusion_jax.config import Experiment, ImageConfig, MeshConfig, SourceConfig
from transfusion_jax.config.stored import dumps, loads
from transfusion_jax.data.pipeline import Data, fitting_sources, stack
from transfusion_jax.data.sources import records
from transfusion_jax.data.sources.dataset import Dataset, open_dataset
from transfusion_jax.evaluation.likelihood import likelihood
from transfusion_jax.evaluation.pairs import pairs
from transfusion_jax.evaluation.suite import check_experiment, check_suites
from transfusion_jax.generation.engine import Engine
from transfusion_jax.images import read_image
from transfusion_jax.model.layers import float32_product
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.preparation.prepare import Preparation, prepare
from transfusion_jax.preparation.preview import description
from transfusion_jax.pretraining.run import latent_space, tokenizer_of
from transfusion_jax.pretraining.validation import Validation

pytestmark = pytest.mark.one_jax

CODECS = {"vq": (VQ, 0), "other": (VQ, 1), "large": (dataclasses.replace(VQ, codes=33), 0),
          "kl": (SMALL, 0)}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """24 pictures of 8x8 with captions, and autoencoders with random weights."""
    made = tmp_path_factory.mktemp("codes")
    (made / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        colour = np.full((8, 8, 3), rng.integers(40, 210, 3))
        picture = (colour + 3 * rng.integers(-13, 14, colour.shape)).astype(np.uint8)
        Image.fromarray(picture).save(made / "pictures" / f"{number}.png")
        (made / "pictures" / f"{number}.txt").write_text(f"square {number % 5}")
    for name, (config, seed) in CODECS.items():
        save_codec(made / name, config, parameters(config, seed), 1.0, 0.0)
    return made


@pytest.fixture(scope="session")
def prepared(folder):
    """Prepares the pictures with an autoencoder, once."""

    def dataset(name: str) -> Dataset:
        out = folder / f"prepared_{name}"
        prepare(settings(folder, name), out, None, False, 1, print)
        return open_dataset(out)

    return dataset


def settings(folder: Path, name: str) -> Preparation:
    return Preparation(
        (str(folder / "pictures"),),
        height=8,
        width=8,
        autoencoder=str(folder / name),
        vocab_size=300,
        held_out=0.3,
    )


def on(dataset: Dataset, **model) -> Experiment:
    """A tiny transfusion that is told of the data what `prepare` says at its end."""
    base = of_family("linear")
    base = replace(base, model=replace(base.model, **model))
    base = replace(base, sampler=replace(base.sampler, max_tokens=30), diffusion=replace(
        base.diffusion, noise_limit=0))  # fmt: skip
    (line,) = (x for x in description(dataset).splitlines() if x.startswith("  train "))
    return override(base, line.split()[1:])


@pytest.fixture(scope="session")
def chameleon(prepared):
    """An engine of a chameleon on the codes, with random weights."""
    dataset = prepared("vq")
    asked = on(dataset)
    plan = tiny.planned(asked)
    codec = load_codec(dataset.path / "autoencoder")
    return Engine(asked, dataset.tokenizer, plan.graph, tiny.random_parameters(plan), codec)


def test_what_prepare_says_at_its_end_trains_on_the_codes(prepared, chameleon):
    asked, dataset = chameleon.experiment, prepared("vq")
    assert (asked.model.family, asked.image) == ("chameleon", dataset.image_config())
    batch = Data(asked, tokenizer_of(asked, Path("new"))).batches()[0]
    assert (batch.latents_BMhwc[batch.image_start_BM < 48] < VQ.codes).all()


def test_codes_are_stored_and_shown_as_the_autoencoder_gives_them(folder, prepared, chameleon):
    dataset, codec = prepared("vq"), load_codec(folder / "vq")
    stored = []
    for number in range(24):
        ((kind, codes),) = dataset.record(number).spans
        assert kind == records.IMAGE
        stored.append(codes)
    files = (folder / "pictures").glob("*.png")
    pictures = np.stack([read_image(file, 8, 8, 3) for file in files])
    expected = np.asarray(codec.codes(pictures))
    assert sorted(x.tolist() for x in stored) == sorted(expected.tolist())
    shown = np.asarray(codec.decode(codec.encode(pictures)[0]))
    for codes, picture in zip(expected[:4].astype(np.float32), shown, strict=False):
        np.testing.assert_allclose(chameleon.picture(codes), picture, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vq", "large", "codes of 33, the experiment has image.codes=32: .* --image.codes 33"),
        ("vq", "kl", "are no codes, and the model needs codes: .* autoencoder of 32"),
        ("kl", "vq", "codes of 32, the experiment has image.codes=0: .*--model.family chameleon"),
    ],
)
def test_images_of_another_kind_are_refused(prepared, name, data, message):
    asked = replace(on(prepared(name)))
    other = prepared(data)
    sources = (SourceConfig(str(other.path)),)
    asked = replace(asked, data=replace(asked.data, sources=sources))
    with pytest.raises(ValueError, match=message):
        Data(asked, other.tokenizer)


def test_codes_of_two_autoencoders_are_not_mixed(prepared, chameleon):
    asked = chameleon.experiment
    both = tuple(SourceConfig(str(prepared(name).path)) for name in ("vq", "other"))
    asked = replace(asked, data=replace(asked.data, sources=both))
    with pytest.raises(ValueError, match="differ in autoencoder"):
        latent_space(fitting_sources(asked, chameleon.tokenizer, "train"))


def test_held_out_codes_of_another_autoencoder_are_refused(prepared, chameleon):
    check_suites(chameleon, ["likelihood"])
    sources = (SourceConfig(str(prepared("other").path)),)
    asked = replace(chameleon.experiment, data=replace(chameleon.experiment.data, sources=sources))
    with pytest.raises(ValueError, match="holds latents of another autoencoder"):
        check_suites(replace(chameleon, experiment=asked), ["likelihood"])


def test_latents_that_an_earlier_version_made_are_not_taken_for_codes(prepared, folder):
    """Versions without codes stored the latents of a VQ autoencoder."""
    dataset = prepared("vq")
    file = dataset.path / "dataset.json"
    now = file.read_text()
    file.write_text(now.replace('"images": "codes"', '"images": null'))
    assert file.read_text() != now
    try:
        with pytest.raises(ValueError, match="what differs: images: None -> codes"):
            prepare(settings(folder, "vq"), dataset.path, None, False, 1, print)
    finally:
        file.write_text(now)


@pytest.mark.parametrize("data", ["vq", "kl"])
def test_a_model_of_text_is_told_that_images_are_not_for_it(prepared, data):
    """And not first that their shape is another."""
    dataset = prepared(data)
    asked = of_family("llama")
    sources = (SourceConfig(str(dataset.path)),)
    asked = replace(
        asked,
        data=replace(asked.data, sources=sources),
        model=replace(asked.model, vocab_size=dataset.embedding_rows),
    )
    with pytest.raises(ValueError, match="has images, and a llama is trained on text alone"):
        Data(asked, dataset.tokenizer)


def code_loss(engine: Engine, rows: Iterable[Batch]) -> float:
    """Mean cross-entropy of the codes of rows, one image at a time, without a cache."""
    model = nnx.merge(engine.graph, engine.parameters)
    losses = []
    for row in (jax.tree.map(jnp.asarray, row) for row in rows):
        hidden, _ = model.read(row, row.image_start_BM, model.new_cache(1, 48))
        log_p = np.asarray(jax.nn.log_softmax(float32_product(hidden, model.output_DV[...])))[0]
        for start, image in zip(row.image_start_BM[0], row.latents_BMhwc[0], strict=True):
            if start < 48:
                tokens = engine.experiment.model.vocab_size + image.reshape(-1).astype(int)
                losses += [-log_p[start - 1 + i, token] for i, token in enumerate(tokens)]
    assert losses
    return float(np.mean(losses))


@pytest.mark.long
def test_a_code_is_measured_once_whatever_the_timestep(chameleon, tmp_path):
    found = likelihood(chameleon, tmp_path, None)
    assert set(found) == {"text_perplexity", "code_loss", "likelihood_rows"}
    held_out = Data(chameleon.experiment, chameleon.tokenizer, "held_out")
    assert found["code_loss"] == pytest.approx(code_loss(chameleon, held_out.once(1)), rel=1e-4)

    plan = tiny.planned(chameleon.experiment)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    (source,) = held_out.sources
    assert chameleon.experiment.train.validation_rows >= len(source) > 1
    # Captions come first or not as drawn, and validation draws on its own.
    rows = [held_out.row(source, r, np.random.default_rng((0, r))) for r in range(len(source))]
    measured = Validation(held_out, plan, mesh).measure(chameleon.parameters, lambda: None)
    assert set(measured) == {f"validation/{source.name}/{x}_loss" for x in ("text", "image")}
    assert measured[f"validation/{source.name}/image_loss"] == pytest.approx(
        code_loss(chameleon, [stack([row]) for row in rows]), rel=1e-4
    )


@pytest.mark.long
def test_drawn_codes_are_compared_by_what_they_stand_for(chameleon, tmp_path, monkeypatch):
    """Code 7 is no nearer to code 8 than to code 30."""
    compared = []
    monkeypatch.setattr(
        "transfusion_jax.evaluation.pairs.variety", lambda *parts: compared.extend(parts) or {}
    )
    pairs(chameleon, tmp_path, None)
    drawn, held_out, training = compared
    codebook = np.asarray(parameters(VQ)["quantizer"]["codebook"])
    for images in (held_out.images, training, [x for x in drawn.images if x is not None]):
        for vector in np.reshape(images, (-1, VQ.latent_channels)):
            assert np.abs(codebook - vector).max(1).min() < 1e-6


# --- text alone ---


@pytest.fixture(scope="module")
def writer(tokenizer) -> Engine:
    """An engine of a model of text alone, on sums."""
    asked = of_family("llama")
    asked = replace(
        asked,
        model=replace(asked.model, vocab_size=512),
        data=replace(asked.data, sources=(SourceConfig("sums"),)),
    )
    plan = tiny.planned(asked)
    return Engine(asked, tokenizer, plan.graph, tiny.random_parameters(plan))


def test_a_model_of_text_is_measured_on_text_alone(writer, tmp_path):
    found = likelihood(writer, tmp_path, 8)
    assert set(found) == {"text_perplexity", "likelihood_rows"} and found["text_perplexity"] > 1
    plan = tiny.planned(writer.experiment)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    held_out = Data(writer.experiment, writer.tokenizer, "held_out")
    measured = Validation(held_out, plan, mesh).measure(writer.parameters, lambda: None)
    assert set(measured) == {"validation/sums/text_loss"}


@pytest.mark.parametrize("name", ["digits", "pairs", "scenes"])
def test_text_alone_is_not_asked_to_draw(writer, name):
    message = f"suite '{name}' asks for pictures, and model.family='llama' writes text alone"
    with pytest.raises(ValueError, match=message):
        check_experiment(replace(writer.experiment, evaluation=(name,)))
    with pytest.raises(ValueError, match=message):
        check_suites(writer, (name,))
    check_suites(writer, ("sums", "likelihood"))


def test_text_alone_is_not_shown_a_picture(writer):
    with pytest.raises(ValueError, match="model.family='llama' reads and writes text alone"):
        writer.check([(np.zeros((4, 4, 1), np.float32), "what is it")])
    writer.check([("two and two",)])


def test_text_alone_needs_no_room_for_an_image(writer):
    """Rows and answers may be shorter than the image that nothing draws."""
    asked = writer.experiment
    short = replace(
        asked,
        image=ImageConfig(32, 32, 8, 2),
        data=replace(asked.data, row_length=40),
        sampler=replace(asked.sampler, max_tokens=5),
    )
    assert loads(dumps(short), "config.json") == short
    plan = tiny.planned(short)
    engine = Engine(short, writer.tokenizer, plan.graph, writer.parameters)
    assert all(isinstance(x, str) for x in engine.generate([("two and two",)])[0])
    assert likelihood(engine, Path(), 4)["text_perplexity"] > 1
