"""Our model, training and generation against `reference.py`, which shares no code with them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx, traverse_util

from transfusion_jax.config import Experiment
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.diffusion.process import draw_training_noise
from transfusion_jax.generation.engine import Engine
from transfusion_jax.pretraining.step import compiled_step

torch = pytest.importorskip("torch")
import reference  # noqa: E402  (needs torch)

# Documents of packed rows, without BOS and EOS. t: text, I: an image, i: one under the noise limit,
# /: only the text that follows is learned.
ROWS = (
    "ttttttt|tttI|ttt|ittttt",
    "tittttI|I/|tt",
    "Ittt|ttIt/tit",
    "tttttttttttttttttttt",
)


def config_of(experiment: Experiment) -> reference.Config:
    model, optimizer, sampler = experiment.model, experiment.optimizer, experiment.sampler
    return reference.Config(
        boi=tiny.TOKENIZER.boi,
        eoi=tiny.TOKENIZER.eoi,
        eos=tiny.TOKENIZER.eos,
        image=experiment.image.shape,
        patch=experiment.image.patch,
        timestep=model.timestep,
        patch_position=model.patch_position,
        theta=model.rope_theta,
        T=experiment.diffusion.steps,
        image_weight=experiment.train.image_loss_weight,
        peak_rate=optimizer.learning_rate,
        final_rate=optimizer.final_learning_rate,
        warmup=optimizer.warmup_steps,
        train_steps=experiment.train.steps,
        decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        average=experiment.train.ema_decay,
        sampler=sampler.kind,
        sampler_steps=sampler.steps,
        guidance=sampler.guidance,
        clip=sampler.clip,
        context_timestep=sampler.context_timestep,
    )


def to_torch(tree) -> dict:
    """A nested dict of arrays under dotted names, in float64."""
    flat = traverse_util.flatten_dict(jax.device_get(tree), sep=".")
    return {name: torch.from_numpy(np.asarray(x, np.float64)) for name, x in flat.items()}


def documents(row: str, rng: np.random.Generator) -> list[tuple[list, int]]:
    """The items of every document (ids, and images with their limit), and how many are silent."""
    made = []
    for letters in row.split("|"):
        items = [tiny.TOKENIZER.bos]
        for letter in letters.replace("/", ""):
            if letter == "t":
                items.append(int(rng.integers(3, tiny.TOKENIZER.boi)))
            else:
                pixels = rng.uniform(-1, 1, tiny.IMAGE.shape).astype(np.float32)
                items.append((pixels, 50 if letter == "i" else 100))
        silent = letters.index("/") + 1 if "/" in letters else 0
        made.append(([*items, tiny.TOKENIZER.eos], silent))
    return made


def our_batch(rows: list):
    packed = []
    for row in rows:
        pieces = []
        for items, silent in row:
            spans = tuple(Text([x]) if isinstance(x, int) else Image(*x) for x in items)
            made = sequence(Document(spans, silent), tiny.TOKENIZER, tiny.IMAGE.patches)
            pieces.append((made, 0, len(made.tokens)))
        packed.append(pack(pieces, 48, tiny.IMAGE))
    return jax.tree.map(jnp.asarray, stack(packed))


def their_batch(rows: list, config, t_BM, noise_BMhwc) -> list[list]:
    """The same rows for the reference, image m of row b noised to timestep t[b, m]."""
    batch = []
    for b, row in enumerate(rows):
        slot, made = 0, []
        for items, silent in row:
            new, silent_new = [], 0
            for number, item in enumerate(items):
                if isinstance(item, int):
                    new.append(item)
                else:
                    noise = torch.from_numpy(np.asarray(noise_BMhwc[b, slot], np.float64))
                    clean = torch.from_numpy(item[0].astype(np.float64))
                    image = reference.noised(config, clean, int(t_BM[b, slot]), noise)
                    new += [config.boi, image, config.eoi]
                    slot += 1
                if number < silent:
                    silent_new = len(new)
            made.append(reference.Document(new, silent_new))
        batch.append(made)
    return batch


@functools.cache
def rows() -> list:
    rng = np.random.default_rng(0)
    return [documents(row, rng) for row in ROWS]


def drawn(experiment: Experiment, step: int, batch):
    """The timesteps and the noise of a training step: a function of (seed, step, row)."""
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), step)
    return draw_training_noise(key, batch.image_limit_BM, batch.latents_BMhwc)


def assert_close(ours, theirs, what: str, relative: float = 1e-5):
    """Every element, relative to the largest."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape, what
    worst, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert worst <= relative * largest, f"{what}: off by {worst}, the largest is {largest}"


VARIANTS = [
    {"timestep": "before", "patch_position": "rope"},
    {"timestep": "after", "patch_position": "rope"},
    {"timestep": "before", "patch_position": "learned"},
    {"timestep": "after", "patch_position": "learned"},
    {"experts": "modality"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_hidden_states_logits_and_predicted_noise(variant):
    experiment = tiny.small(**variant)
    config, plan, batch = config_of(experiment), tiny.planned(experiment), our_batch(rows())
    parameters = tiny.random_parameters(plan)
    t_BM, noise_BMhwc = drawn(experiment, 0, batch)
    theirs = their_batch(rows(), config, t_BM, noise_BMhwc)
    noisy_BMhwc = np.zeros(batch.latents_BMhwc.shape, np.float32)
    for b, row in enumerate(theirs):
        for m, image in enumerate(reference.positions(config, row)[1]):
            noisy_BMhwc[b, m] = image.values

    @jax.jit
    def run(parameters, batch, noisy_BMhwc, t_BM):
        model = nnx.merge(plan.graph, parameters)
        hidden, predicted = model(batch, noisy_BMhwc, t_BM)
        return hidden, model.logits(hidden), predicted

    ours = run(parameters, batch, jnp.asarray(noisy_BMhwc), t_BM)
    for b, row in enumerate(theirs):
        hidden, logits, noises = reference.forward(to_torch(parameters), config, row)
        assert_close(ours[0][b, : len(hidden)], hidden, "hidden states")
        assert_close(ours[1][b, : len(hidden)], logits, "logits")
        for m, noise in enumerate(noises):
            assert_close(ours[2][b, m], noise, "predicted noise")


PARTS = "parameters", "first moment", "second moment", "average"


def parts(state) -> list[dict]:
    """`PARTS` of our state, for the reference."""
    moments = [optax.tree_utils.tree_get(state.optimizer, name) for name in ("mu", "nu")]
    return [to_torch(tree) for tree in (state.parameters, *moments, state.ema)]


def check_steps(experiment: Experiment, steps: int, clipped: bool):
    """Steps of ours, each against the reference's from the same state."""
    config, plan, batch = config_of(experiment), tiny.planned(experiment), our_batch(rows())
    step = compiled_step(plan)
    state = tiny.fresh_state(plan, tiny.random_parameters(plan))
    for n in range(steps):
        theirs = their_batch(rows(), config, *drawn(experiment, n, batch))
        before = parts(state)  # ours, so that rounding does not add up over the steps
        state, metrics = step(state, batch)
        losses, gradients, *after = reference.train_step(config, theirs, n, *before)
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        assert (norm > config.clip_norm) == clipped
        assert_close(metrics["loss"], losses[0], f"loss {n}")
        assert_close(metrics["text_loss"], losses[1], f"text loss {n}")
        assert_close(metrics["image_loss"], losses[2], f"image loss {n}")
        assert_close(metrics["grad_norm"], norm, f"gradient norm {n}")
        assert_close(metrics["learning_rate"], reference.learning_rate(config, n), f"rate {n}")
        for what, ours, expected in zip(PARTS, parts(state), after, strict=True):
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(ours[name], value, f"{what} of {name} after step {n}", 5e-5)


@pytest.mark.long
def test_steps_through_warm_up_and_decay():
    """Losses, gradients of every parameter, clipping, AdamW, rate, decay mask and average."""
    check_steps(tiny.small(**VARIANTS[0]), steps=5, clipped=True)


@pytest.mark.long
def test_steps_of_a_mixture_of_transformers():
    check_steps(tiny.small(**VARIANTS[4]), steps=3, clipped=True)


def test_steps_without_clipping_nor_microbatches():
    experiment = tiny.small(**VARIANTS[3])
    experiment = replace(
        experiment,
        optimizer=replace(experiment.optimizer, clip_norm=1e4, warmup_steps=0),
        train=replace(experiment.train, accumulation=1, ema_decay=0.9999),
    )
    check_steps(experiment, steps=3, clipped=False)


@pytest.fixture
def noises(monkeypatch) -> list[np.ndarray]:
    """What `jax.random.normal` gives from here on, in the order in which it is drawn."""
    kept = []
    original = jax.random.normal

    def keep(values):
        kept.append(np.asarray(values))
        return kept[-1]

    def normal(*arguments, **named):
        values = original(*arguments, **named)
        shape = jax.ShapeDtypeStruct(values.shape, values.dtype)
        return jax.pure_callback(keep, shape, values, vmap_method="sequential")

    monkeypatch.setattr(jax.random, "normal", normal)
    return kept


def their_prompt(request: tuple, config) -> list:
    """A request as the reference's items: `<s>`, then its texts and clean images."""
    items = [tiny.TOKENIZER.bos]
    for span in request:
        if isinstance(span, str):
            items += tiny.TOKENIZER.encode(span)
        else:
            clean = torch.from_numpy(span.astype(np.float64))
            items += [config.boi, reference.Image(clean, config.context_timestep), config.eoi]
    return items


def spans_of(items: list) -> list:
    """Generated items as the engine returns them: texts and pictures."""
    spans, ids = [], []
    for item in [*items, tiny.TOKENIZER.boi]:
        if isinstance(item, reference.Image):
            spans.append(item.values.numpy())
        elif item != tiny.TOKENIZER.boi:
            ids.append(item)
        elif text := tiny.TOKENIZER.decode([i for i in ids if i != tiny.TOKENIZER.eoi]):
            spans.append(text)
        if item == tiny.TOKENIZER.boi:
            ids = []
    return spans


SAMPLERS = [
    (5, {"kind": "ddpm", "clip": 1.5, "guidance": 2.5}, {}),
    (4, {"kind": "ddim", "clip": 0.0, "guidance": 1.5}, {}),
    (4, {"kind": "ddim", "clip": 0.0, "guidance": 1.5}, {"experts": "modality"}),
]


@pytest.mark.long
@pytest.mark.parametrize(("seed", "sampler", "changes"), SAMPLERS, ids=["ddpm", "ddim", "mixture"])
def test_pictures_and_the_text_around_them(seed, sampler, changes, noises):
    """Texts and pictures in, texts and pictures out, from the noise that ours has drawn."""
    experiment = tiny.small(timestep="after", patch_position="learned", **changes)
    experiment = replace(experiment, sampler=replace(experiment.sampler, **sampler))
    config, plan = config_of(experiment), tiny.planned(experiment)
    parameters = tiny.talkative(tiny.random_parameters(plan, seed))
    picture = np.random.default_rng(2).uniform(-1, 1, tiny.IMAGE.shape).astype(np.float32)
    requests = [(f"5 9 {tiny.DRAW}",), (picture, f"7 11 {tiny.DRAW}"), ("12 4 30",), (picture, "8")]
    spans = Engine(experiment, tiny.TOKENIZER, plan.graph, parameters).generate(requests, seed=4)

    drawn = np.stack(noises).reshape(-1, config.sampler_steps + 1, len(requests), *tiny.IMAGE.shape)
    used = []
    barred = [
        tiny.TOKENIZER.bos,
        tiny.TOKENIZER.eoi,
        *range(tiny.TOKENIZER.size, experiment.model.vocab_size),
    ]
    for row, request in enumerate(requests):
        own = [torch.from_numpy(x.astype(np.float64)) for x in drawn[:, :, row]]
        prompt, room = their_prompt(request, config), experiment.sampler.max_tokens
        items = reference.generate(to_torch(parameters), config, prompt, room, own, barred)
        expected = spans_of(items)
        pictures = [x for x in expected if not isinstance(x, str)]
        used += [z.tobytes() for z in drawn[: len(pictures), :, row].reshape(-1, *tiny.IMAGE.shape)]
        assert [type(x) for x in spans[row]] == [type(x) for x in expected]
        for ours, theirs in zip(spans[row], expected, strict=True):
            if isinstance(theirs, str):
                assert ours == theirs
            else:
                assert_close(ours, theirs, f"picture of request {row}", 2e-4)
    assert len(set(used)) == len(used)  # every noise is used once
    texts = [[x for x in row if isinstance(x, str)] for row in spans]
    assert all(isinstance(row[0], np.ndarray) for row in spans[:2]) and isinstance(spans[2][0], str)
    assert all(texts) and texts[0] != texts[1]  # what follows a picture depends on it
