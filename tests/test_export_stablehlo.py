"""`export --format stablehlo`: what leaves runs without this package, and gives the same bits."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from autoencoder_cases import SMALL, VQ
from autoencoder_cases import parameters as autoencoder_parameters
from exported import run_directory
from PIL import Image

from transfusion_jax.autoencoder.codec import load_codec, save_codec
from transfusion_jax.commands.main import main
from transfusion_jax.config import ImageConfig
from transfusion_jax.config import diffusion as diffusion_config
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.export import runner
from transfusion_jax.generation.engine import load_engine

pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

DRAW = "three"
PROMPT = f"one plus two is {DRAW}"
ALONE = """
import runpy, sys
for name in ("transfusion_jax", "flax", "optax", "orbax", "sentencepiece", "safetensors", "PIL"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Calls every phase on the arrays of a file; {call} says how.
PHASES = """
import sys
import jax, jax.numpy as jnp, numpy as np
given = dict(np.load(sys.argv[1]))
{setup}
k, v = given["k"], given["v"]
out = {{}}
prompt = [given[x] for x in ("tokens", "length", "images", "start", "t") if x in given]
out["read"], k, v = {prefill}(*prompt, k, v)
out["written"], k, v = {decode}(given["token"], given["length"], k, v)
if "noisy" in given:
    out["drawn"], k, v = {denoise}(given["noisy"], given["t"], given["length"] + 1, k, v)
np.savez(sys.argv[2], k=k, v=v, **out)
"""
EXPORTED = PHASES.format(
    setup="""
for name in ("transfusion_jax", "flax"):
    sys.modules[name] = None
import runpy
model = runpy.run_path(sys.argv[3] + "/run.py")["Model"](__import__("pathlib").Path(sys.argv[3]))
import functools
for name in model.about["programs"]:
    globals()[name] = functools.partial(getattr(model, name), model.weights)
""",
    prefill="prefill",
    decode="decode",
    denoise="denoise",
)
OURS = PHASES.format(
    setup="""
from pathlib import Path
from flax import nnx
from transfusion_jax.batch import Batch
from transfusion_jax.generation.engine import load_engine
from transfusion_jax.model.interface import Context
from transfusion_jax.model.transformer import KVCache
engine, _ = load_engine(Path(sys.argv[3]), print)

def phase(function):
    run = jax.jit(lambda p, *arrays: function(nnx.merge(engine.graph, p), *arrays))
    return lambda *arrays: run(engine.parameters, *arrays)

def read(net, tokens, length, images, start, t, k, v):
    index = jnp.arange(tokens.shape[1])[None]
    segment = (index < length[:, None]).astype(jnp.int32)
    batch = Batch(tokens, segment, index * segment, tokens, segment.astype(jnp.float32), images,
                  start, jnp.ones_like(start))
    hidden, cache = net.read(batch, jnp.full_like(start, t), KVCache(k, v))
    last = jnp.stack([hidden[b, length[b] - 1] for b in range(len(length))])
    return logits(net, last[:, None]), cache.k, cache.v

def logits(net, hidden):
    text = net.logits(hidden)[:, 0]
    codes = hasattr(net, "code_logits")
    return jnp.concatenate([text, net.code_logits(hidden)[:, 0]], 1) if codes else text

def write(net, token, length, k, v):
    hidden, cache = net.extend(token[:, None], Context(KVCache(k, v), length, None))
    return logits(net, hidden), cache.k, cache.v

def draw(net, noisy, t, length, k, v):
    predicted, cache = net.denoise(noisy, t, Context(KVCache(k, v), length, None))
    return predicted, cache.k, cache.v
""",
    prefill="phase(read)",
    decode="phase(write)",
    denoise="phase(draw)",
)


def talkative(experiment, tokenizer) -> dict:
    """Weights that write for a while, and draw after a certain word."""
    parameters = tiny.random_parameters(tiny.planned(experiment), 5)
    after = tokenizer.encode(DRAW)[-1]
    embedding = (0.1 * parameters["embedding_VD"]).at[after].multiply(20.0)
    output = parameters["output_DV"].at[:, tokenizer.eos].multiply(0.3)
    if experiment.model.images != "none":
        output = output.at[:, tokenizer.boi].set(0.2 * embedding[after])
    return {**parameters, "embedding_VD": embedding, "output_DV": output}


def exported(path: Path, experiment, tokenizer, *flags: str, autoencoder=None) -> tuple[Path, Path]:
    """A run and what it leaves as."""
    parameters = talkative(experiment, tokenizer)
    run = run_directory(path / "run", experiment, tokenizer=tokenizer, parameters=parameters)
    if autoencoder:
        save_codec(run / "autoencoder", autoencoder, autoencoder_parameters(autoencoder), 0.5, -0.2)
    out = path / "out"
    assert main(["export", str(run), "--format", "stablehlo", "--out", str(out), *flags]) == 0
    return run, out


@pytest.fixture(scope="module")
def left(experiment, tokenizer, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("stablehlo"), experiment, tokenizer)


def python(*arguments) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "PYTHONWARN"))}
    run = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def answers(out: Path) -> list:
    """Of the lines of `outputs.jsonl`, the texts and pixels."""
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    return [
        [s["text"] if "text" in s else np.asarray(Image.open(out / s["image"])) for s in x["spans"]]
        for x in lines
    ]


@pytest.mark.long
def test_every_phase_gives_the_bits_of_the_model(left, experiment, tmp_path):
    """Three rows of other lengths, two with images, another capacity than that of the runner."""
    given, rng = three_rows(experiment), np.random.default_rng(1)
    shape = experiment.image.shape
    given["images"] = rng.standard_normal((3, 2, *shape)).astype(np.float32)
    given["noisy"] = rng.standard_normal((3, *shape)).astype(np.float32)
    check_bits(left, tmp_path, given, given)


def three_rows(experiment) -> dict[str, np.ndarray]:
    """Tokens, places of images and an empty cache."""
    rng = np.random.default_rng(0)
    model, L = experiment.model, 2 * experiment.model.attention_block
    length = np.asarray([L - 5, 9, L - 1], np.int32)
    tokens = rng.integers(5, 300, (3, L))
    start = np.asarray([[7, L], [L, L], [3, 30]], np.int32)
    shape = (model.layers, 3, L + 37, model.num_kv_heads, model.head_dim)
    return dict(
        tokens=tokens.astype(np.int32),
        length=length,
        start=start,
        t=np.int32(7),
        token=np.asarray([3, 50, 70], np.int32),
        k=np.zeros(shape, np.float32),
        v=np.zeros(shape, np.float32),
    )


def check_bits(left, path: Path, to_export: dict, to_ours: dict) -> None:
    """The phases of an export, in a process without this package, and of its run."""
    run, out = left
    found = []
    for name, script, source, given in (
        ("exported", EXPORTED, out, to_export),
        ("ours", OURS, run, to_ours),
    ):
        np.savez(path / "given.npz", **given)
        (path / f"{name}.py").write_text(script)
        python(path / f"{name}.py", path / "given.npz", path / f"{name}.npz", source)
        found.append(np.load(path / f"{name}.npz"))
    theirs, ours = found
    assert sorted(theirs) == sorted(ours)
    for name in ours:
        assert np.isfinite(ours[name]).all() and np.abs(ours[name]).max() > 0.1
        np.testing.assert_array_equal(theirs[name], ours[name])


@pytest.mark.long
def test_the_runner_answers_as_generate_does_without_this_package(left, tmp_path):
    run, out = left
    (tmp_path / "alone.py").write_text(ALONE)
    words = ["--prompt", f"one plus two is {DRAW}", "--num", "2", "--seed", "3"]
    words += ["--max-tokens", "40", "--temperature", "0.9"]
    python(tmp_path / "alone.py", out / "run.py", *words, "--out", tmp_path / "theirs")
    assert main(["generate", str(run), *words, "--out", str(tmp_path / "ours")]) == 0
    theirs, ours = answers(tmp_path / "theirs"), answers(tmp_path / "ours")
    assert [len(spans) for spans in theirs] == [len(spans) for spans in ours]
    kinds = {type(span) for spans in ours for span in spans}
    assert kinds == {str, np.ndarray}
    for a, b in zip(sum(theirs, []), sum(ours, []), strict=True):
        if isinstance(b, str):
            assert a == b
        else:  # the tests' XLA does not optimise, which rounds differently
            assert np.abs(a.astype(int) - b).max() <= 1 and b.std() > 20


def test_the_runner_refuses_in_a_line_what_it_cannot_read(left, tmp_path, capsys, monkeypatch):
    """An id beyond the vocabulary would be answered: lookups are clamped. Numbers are bounded as in
    a config, and a picture is what the model sees."""
    assert (runner.LEAST, runner.MOST) == (diffusion_config.LEAST, diffusion_config.MOST)
    assert runner.MOST_TOKENS == diffusion_config.MOST_TOKENS
    shown = np.zeros((8, 8, 1))
    broken = {
        "wide": np.zeros((3, 5, 1)),
        "flat": shown[..., 0],
        "one": shown[:1, :1],
        "bytes": np.uint8(shown + 255),
        "nan": shown * np.nan,
        "text": shown.astype(str),
    }
    for name, array in broken.items():
        np.save(tmp_path / f"{name}.npy", np.char.add(array, "x") if name == "text" else array)
    np.savez(tmp_path / "many.npz", a=shown)
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    (tmp_path / "no.npy").write_bytes(bytes(10))
    monkeypatch.setattr(runner, "__file__", str(left[1] / "run.py"))
    images = [
        ("--image", str(tmp_path / f"{name}.npy")) for name in (*broken, "many", "no", "missing")
    ]
    numbers = ("--num 0", "--seed -1", f"--seed {2**32}", "--steps 0", "--steps 1001",
               "--max-tokens 0", "--max-tokens 1", "--max-tokens 1048577", "--guidance inf",
               "--guidance 1e39", "--temperature nan", "--temperature -1",
               "--temperature 1e-40")  # fmt: skip
    for words in (("--ids", "99999"), ("--ids", "-1"), *images, *map(str.split, numbers)):
        assert refused_by_runner(monkeypatch, capsys, tmp_path / "out", *words).startswith(words[0])

    def said(*words: str) -> str:
        return refused_by_runner(monkeypatch, capsys, tmp_path / "out", *words)

    assert "positions are more than" in said("--ids", *["5"] * 2000)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file")
    assert "is a file" in said("--ids", "5")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert "pip install flatbuffers" in said("--ids", "5")


def refused_by_runner(monkeypatch, capsys, out: Path, *words: str) -> str:
    """What run.py says where it ends with 2."""
    monkeypatch.setattr("sys.argv", ["run.py", *words, "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        runner.main()
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


def test_it_is_for_three_platforms(left):
    for name in ("prefill", "decode", "denoise"):
        data = (left[1] / f"{name}.jax_export").read_bytes()
        assert jax.export.deserialize(data).platforms == ("cpu", "cuda", "tpu")


def compared(run: Path, out: Path, tokenizer, shown=(), prompt=PROMPT, **asked) -> list[type]:
    """The kinds of spans that a run and its export both answer with, once they are equal."""
    engine = load_engine(run, print)[0].using(**asked)
    model = runner.Model(out)
    pictures = [engine.picture(image) for image in shown]
    (ours,) = engine.generate([(*pictures, prompt)], 3)
    ids = [tokenizer.boi] * len(shown) + tokenizer.encode(prompt)
    theirs = list(model.generate(ids, [engine.image(p) for p in pictures], seed=3, **asked))
    for a, b in zip(theirs, ours, strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            np.testing.assert_allclose(model.picture_of(a), b, atol=1e-4)
            assert b.std() > 0.1
    return [type(span) for span in ours]


CASES = {
    "unet, v, guidance 1": (
        dict(patch_encoder="unet", unet_widths=(16, 32), unet_blocks=1),
        dict(prediction="v"),
        dict(guidance=1.0),
    ),
    "flow, ddim": (dict(), dict(prediction="flow", schedule="flow"), dict(kind="ddim")),
    "mixture": (dict(experts="modality"), dict(), dict()),
    "x, stable": (dict(qk_norm=True, norm_placement="post"), dict(prediction="x"), dict()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_switches_leave_too(name, experiment, tokenizer, tmp_path):
    model, diffusion, sampler = CASES[name]
    changed = replace(
        experiment,
        model=replace(experiment.model, **model),
        diffusion=replace(experiment.diffusion, **diffusion),
        sampler=replace(experiment.sampler, **sampler),
    )
    run, out = exported(tmp_path, changed, tokenizer)
    assert np.ndarray in compared(run, out, tokenizer)


@pytest.mark.long
def test_images_in_a_prompt_are_read(left, experiment, tokenizer):
    image = np.random.default_rng(4).uniform(-1, 1, experiment.image.shape).astype(np.float32)
    assert str in compared(*left, tokenizer, [image])


@pytest.mark.long
def test_answers_to_a_text_begin_as_those_of_generate(left, tokenizer):
    """With the space between them."""
    prompts, asked = ["a", "the sum", "two"], dict(temperature=1.0, max_tokens=20)
    ours = load_engine(left[0], print)[0].using(**asked).generate([(p,) for p in prompts], 4)
    model = runner.Model(left[1])
    for row, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt)
        assert next(model.generate(ids, seed=4, row=row, **asked)) == ours[row][0]
    assert any(spans[0].startswith(" ") for spans in ours)


@pytest.mark.long
def test_a_model_of_text_alone_leaves_without_a_phase_for_images(experiment, tokenizer, tmp_path):
    model = replace(experiment.model, family="llama", image_attention="causal")
    run, out = exported(tmp_path, replace(experiment, model=model), tokenizer)
    assert compared(run, out, tokenizer) == [str]
    assert not (out / "denoise.jax_export").exists()


@pytest.mark.slow
def test_latents_become_pictures(experiment, tokenizer, tmp_path):
    latents = replace(experiment, image=ImageConfig(8, 8, SMALL.latent_channels, 2))
    run, out = exported(tmp_path, latents, tokenizer, autoencoder=SMALL)
    assert np.ndarray in compared(run, out, tokenizer)
    codec = load_codec(run / "autoencoder")
    image = np.random.default_rng(0).standard_normal(latents.image.shape).astype(np.float32)
    picture = runner.Model(out).picture_of(image)
    np.testing.assert_allclose(picture, codec.picture(image), atol=1e-5)


def test_weights_in_bfloat16_are_those_that_generate_computes_with(experiment, tokenizer, tmp_path):
    low = replace(experiment, model=replace(experiment.model, compute_dtype="bfloat16"))
    run, out = exported(tmp_path, low, tokenizer, "--dtype", "bfloat16")
    weights = runner.read_weights(out, "model")
    kinds = {name: str(x.dtype) for name, x in weights.items()}
    assert {kinds[name] for name in kinds if "norm" in name} == {"float32"}
    assert {kinds[name] for name in kinds if "norm" not in name} == {"bfloat16"}
    parameters = load_engine(run, print)[0].parameters
    for name, value in weights.items():
        ours = parameters
        for part in name.split("."):
            ours = ours[part]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(ours))


@pytest.fixture(scope="module")
def codes(experiment, tokenizer, tmp_path_factory):
    """A chameleon, and what it leaves as."""
    model = replace(experiment.model, family="chameleon", image_attention="causal", qk_norm=True)
    image = ImageConfig(4, 4, 1, 1, codes=VQ.codes)
    chameleon = replace(experiment, model=model, image=image)
    path = tmp_path_factory.mktemp("codes")
    return chameleon, exported(path, chameleon, tokenizer, autoencoder=VQ)


@pytest.mark.long
def test_images_that_are_codes_leave_as_tokens(codes, tmp_path):
    chameleon, left = codes
    image, given = chameleon.image, three_rows(chameleon)
    shape = (3, 2, *image.shape)
    given["images"] = np.random.default_rng(1).integers(0, image.codes, shape).astype(np.float32)
    given["token"][2] = chameleon.model.vocab_size + 5
    told = {name: x for name, x in given.items() if name not in ("images", "start", "t")}
    told["tokens"] = given["tokens"].copy()
    for row, slot in zip(*np.nonzero(given["start"] < given["tokens"].shape[1]), strict=True):
        start = given["start"][row, slot]
        told["tokens"][row, start : start + image.patches] = runner.Model(left[1]).tokens_of(
            given["images"][row, slot]
        )
    check_bits(left, tmp_path, told, given)
    assert not (left[1] / "denoise.jax_export").exists()


@pytest.mark.long
def test_the_runner_writes_images_of_codes(codes, tokenizer):
    chameleon, left = codes
    shown = np.random.default_rng(3).integers(0, VQ.codes, chameleon.image.shape)
    shown = shown.astype(np.float32)
    for asked in (dict(), dict(guidance=1.0, temperature=0.7), dict(image_temperature=0.0)):
        assert np.ndarray in compared(*left, tokenizer, [shown], **asked)


def test_the_runner_refuses_codes_that_are_none(codes, tmp_path, capsys, monkeypatch):
    chameleon, left = codes
    monkeypatch.setattr(runner, "__file__", str(left[1] / "run.py"))
    for value in (VQ.codes, -1, 0.5, np.nan):
        np.save(tmp_path / "image.npy", np.full(chameleon.image.shape, value))
        words = ["--image", str(tmp_path / "image.npy"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", ["run.py", *words])
        with pytest.raises(SystemExit, match="2"):
            runner.main()
        assert f"codes are from 0 to {VQ.codes - 1}" in capsys.readouterr().err


TEXTS = ["", " ", "three plus four", "  two  spaces ", "ünïcode ✓ 😀 日本", "a\nb\tc", "12345 6.7",
         "▁ under", "\x00\x7f", "The quick brown fox."]  # fmt: skip


def test_the_runners_tokenizer_is_sentencepiece(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(tokenizer.model)
    own = runner.Tokenizer(file)
    rng = np.random.default_rng(0)
    random = ["".join(rng.choice(list("one twhreus  é😀9"), 20)) for _ in range(50)]
    for text in TEXTS + random:
        ids = own.encode(text)
        assert ids == tokenizer.encode(text)
        assert own.decode([tokenizer.bos, *ids, tokenizer.eoi]) == tokenizer.decode(ids)
    for _ in range(50):
        ids = rng.integers(3, tokenizer.size - 2, 12).tolist()
        assert own.decode(ids) == tokenizer.decode(ids)
        assert own.decode(ids, True) == tokenizer.decode(ids, True)


def test_the_runners_tokenizer_takes_long_texts(tokenizer, tmp_path):
    """In a time that grows with the length, not with its square: that would be a minute."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(tokenizer.model)
    rng = np.random.default_rng(1)
    text = "".join(rng.choice(list("one two three plus sum larger  é9"), 30_000))
    own, begin = runner.Tokenizer(file), time.process_time()
    assert own.encode(text) == tokenizer.encode(text)
    assert time.process_time() - begin < 20


def test_a_tokenizer_that_changes_text_is_not_imitated(tmp_path):
    import sentencepiece

    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "unigram"), vocab_size=20, minloglevel=2
    )
    other = Tokenizer((tmp_path / "unigram.model").read_bytes())
    with pytest.raises(ValueError, match="give --ids"):
        runner.Tokenizer(tmp_path / "unigram.model").encode("one")
    assert other.encode("one")


@pytest.mark.parametrize("option", ["byte_fallback=False", "treat_whitespace_as_suffix=True"])
def test_other_byte_pair_tokenizers_are_imitated_or_refused(tmp_path, option):
    import sentencepiece

    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven\n" * 50)
    name, value = option.split("=")
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "other"), vocab_size=40, minloglevel=2,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        **{name: value == "True"},
    )  # fmt: skip
    theirs = Tokenizer((tmp_path / "other.model").read_bytes())
    ours = runner.Tokenizer(tmp_path / "other.model")
    if value == "True":
        with pytest.raises(ValueError, match="give --ids"):
            ours.encode("one two")
        return
    for text in ("one ZZZ two", "ZZ", "one", "Zone twoZ Z"):  # a run of unknowns is one
        assert ours.encode(text) == theirs.encode(text)
