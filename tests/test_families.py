"""Every family and switch, through the one interface: masks, packing, caches, meshes, checkpoints,
drawing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
import tiny
from flax import nnx

from transfusion_jax.config import (
    DataConfig,
    DiffusionConfig,
    Experiment,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    SamplerConfig,
    SourceConfig,
)
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.generation.engine import Engine
from transfusion_jax.generation.guidance import guidance
from transfusion_jax.generation.rows import IMAGE, Rows
from transfusion_jax.model.build import build
from transfusion_jax.model.interface import Context, Model
from transfusion_jax.model.layers import float32_product
from transfusion_jax.model.work import batch_work, model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.objective import batch_losses
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.one_jax

CODES = 8
PICTURE = ImageConfig(4, 4, 1, 2)
GRID = ImageConfig(2, 2, 1, 1, codes=CODES)
STABLE = {"qk_norm": True, "norm_placement": "post"}
UNET = {"patch_encoder": "unet", "unet_widths": (16, 32), "unet_blocks": 1}
FAMILIES = {
    "linear": {},
    "mixture": {"experts": "modality"},
    "causal": {"image_attention": "causal"},
    "unet": UNET,
    "stable transfusion": STABLE,
    "stable mixture": {"experts": "modality", **STABLE},
    "chameleon": {"family": "chameleon", "image_attention": "causal", **STABLE},
    "llama": {"family": "llama", "image_attention": "causal"},
    "stable llama": {"family": "llama", "image_attention": "causal", **STABLE},
}
DIFFUSED = [name for name, changes in FAMILIES.items() if "family" not in changes]
WITH_IMAGES = [name for name, changes in FAMILIES.items() if changes.get("family") != "llama"]


def experiment(name: str, **changes) -> Experiment:
    """A tiny experiment of a family on the `synthetic` source."""
    small = tiny.small()
    settings = {
        "name": name.replace(" ", "_"),
        "image": GRID if name == "chameleon" else PICTURE,
        "model": replace(small.model, **FAMILIES[name]),
    }
    return replace(small, **settings, **changes)


@functools.cache
def model(name: str) -> Model:
    """Random weights, under which every path carries a signal."""
    plan = tiny.planned(experiment(name))
    return nnx.merge(plan.graph, tiny.random_parameters(plan))


def written(name: str, packing: str) -> str:
    """A packing for a family: one of text has no images, one of codes no image without BOI."""
    found = packings.PACKINGS[packing].replace("|I", "|tI")
    return found if name in WITH_IMAGES else found.replace("I", "t" * packings.P)


def rows(name: str, *names: str):
    """Packed rows, with images if the family has any, and codes if it takes codes."""
    batch = jax.tree.map(jnp.asarray, packings.batch([written(name, n) for n in names]))
    if name == "chameleon":
        codes = np.random.default_rng(1).integers(CODES, size=(*batch.image_start_BM.shape, 2, 2))
        # In real rows an image follows BOI, which has no text loss.
        follows = model(name).weights(batch)["image"]
        batch = replace(
            batch,
            latents_BMhwc=jnp.asarray(codes[..., None], jnp.float32),
            text_weight_BL=batch.text_weight_BL * (1 - follows),
        )
    return batch


def noise_of(batch) -> Noise:
    t = np.random.default_rng(0).integers(0, 100, batch.image_start_BM.shape)
    noise = jax.random.normal(jax.random.key(2), batch.latents_BMhwc.shape)
    return Noise(jnp.asarray(t, jnp.int32), noise)


@functools.cache
def compiled_losses(name: str):
    return jax.jit(lambda batch, noise: model(name).losses(batch, noise, 16))


def losses(name: str, batch, noise) -> dict:
    return compiled_losses(name)(batch, noise)


@pytest.mark.parametrize("name", FAMILIES)
def test_is_a_model(name):
    assert isinstance(model(name), Model)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_depend_on_what_the_family_may_see(name):
    """A change at position j, of a token, a code or a patch, moves exactly the positions that see
    j."""
    batch = rows(name, "documents with images")
    net = model(name)
    t = jnp.full_like(batch.image_start_BM, 10)
    read = jax.jit(lambda b: net.read(b, t, net.new_cache(1, packings.LENGTH))[0][0])
    before = read(batch)
    seen = packings.mask(written(name, "documents with images"))
    if experiment(name).model.image_attention == "causal":
        seen = seen & np.tri(packings.LENGTH, dtype=bool)
    patch_of = {
        int(begin) + p: (slot, p)
        for slot, begin in enumerate(batch.image_start_BM[0])
        for p in range(packings.P)
    }
    for j in range(int((batch.segment_BL[0] > 0).sum())):
        if j in patch_of:
            slot, p = patch_of[j]
            side = batch.latents_BMhwc.shape[2] // 2
            h, w = side * (p // 2), side * (p % 2)
            image = batch.latents_BMhwc[0, slot]
            image = image.at[h, w, 0].set((image[h, w, 0] + 1) % CODES)
            moved = batch.latents_BMhwc.at[0, slot].set(image)
            changed = replace(batch, latents_BMhwc=moved)
        else:
            token = (batch.tokens_BL[0, j] + 1) % 30
            changed = replace(batch, tokens_BL=batch.tokens_BL.at[0, j].set(token))
        moves = np.abs(np.asarray(read(changed) - before)).max(-1) > 1e-6
        if name == "unet" and j in patch_of:  # its convolutions see all of the image
            first = j - patch_of[j][1]
            expected = seen[:, first : first + packings.P].any(1)
            assert moves[expected].all() and not moves[~expected].any()
        else:
            np.testing.assert_array_equal(moves, seen[:, j])


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached(name):
    """What is read into a cache gives the losses of training: images at timestep 0, without
    noise."""
    batch = rows(name, "documents with images", "several images")
    net = model(name)
    clean = Noise(jnp.zeros_like(batch.image_start_BM), jnp.zeros_like(batch.latents_BMhwc))
    alpha = 1.0
    if name in DIFFUSED:
        alpha = net.process.schedule.alpha(jnp.int32(0))
    seen = replace(batch, latents_BMhwc=batch.latents_BMhwc * alpha)
    hidden, _ = net.read(seen, clean.t_BM, net.new_cache(2, packings.LENGTH + 5))
    log_p = jax.nn.log_softmax(float32_product(hidden, net.output_DV[...]))
    expected = -jnp.take_along_axis(log_p, batch.text_target_BL[..., None], -1)[..., 0]
    got = losses(name, batch, clean)
    weight = np.asarray(net.weights(batch)["text"]) > 0
    np.testing.assert_allclose(got["text"][weight], expected[weight], rtol=1e-4, atol=1e-5)
    log_z = jax.nn.logsumexp(float32_product(hidden, net.output_DV[...]), axis=-1)
    np.testing.assert_allclose(got["z"][weight], log_z[weight] ** 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSED)
def test_a_denoising_step_on_a_cache_is_that_of_the_whole_document(name):
    """`<s> 7 9 BOI image`: the prediction for the image, at every timestep."""
    net = model(name)
    tokens = jnp.asarray([[1, 7, 9, 38]], jnp.int32)
    image = jax.random.normal(jax.random.key(3), (1, *PICTURE.shape))
    empty = Context(net.new_cache(1, 10), jnp.zeros((1,), jnp.int32), None)
    hidden, cache = net.extend(tokens, empty)
    context = Context(cache, jnp.asarray([4], jnp.int32), hidden[:, -1])
    document = sequence(
        Document((Text([1, 7, 9]), Image(np.asarray(image[0]), 1))), tiny.TOKENIZER, PICTURE.patches
    )
    batch = jax.tree.map(jnp.asarray, stack([pack([(document, 0, 9)], 10, PICTURE)]))
    for t in (3, 70):
        t_BM = jnp.full_like(batch.image_start_BM, t)
        _, expected = net(batch, batch.latents_BMhwc, t_BM)
        got, _ = net.denoise(image, jnp.int32(t), context)
        np.testing.assert_allclose(got, expected[:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_unpacked(name):
    """The weighted losses of a row are the sum of those of its documents, each in a row of its
    own."""
    batch = rows(name, "documents with images")
    noise = noise_of(batch)
    weights = model(name).weights(batch)
    whole = {k: np.sum(x * weights[k]) for k, x in losses(name, batch, noise).items()}
    parts = dict.fromkeys(whole, 0.0)
    for document in range(1, int(batch.segment_BL.max()) + 1):
        alone, its_noise = _alone(batch, noise, document)
        weight = model(name).weights(alone)
        for k, x in losses(name, alone, its_noise).items():
            parts[k] += np.sum(x * weight[k])
    for k in whole:
        np.testing.assert_allclose(parts[k], whole[k], rtol=1e-4)
        assert whole[k] > 0


@pytest.mark.parametrize("name", ["linear", "unet"])
def test_in_bfloat16_late_timesteps_are_told_apart(name):
    """Bfloat16 rounds 899 and 901 to 900."""
    moves = {}
    noisy = jax.random.normal(jax.random.key(0), (1, 2, *PICTURE.shape))
    for dtype in ("float32", "bfloat16"):
        asked = experiment(name, diffusion=DiffusionConfig(steps=1000))
        plan = tiny.planned(replace(asked, model=replace(asked.model, compute_dtype=dtype)))
        patches = nnx.merge(plan.graph, tiny.random_parameters(plan)).patches
        vectors, _ = patches.encode(noisy, jnp.asarray([[899, 901]]))
        again, _ = patches.encode(noisy, jnp.asarray([[901, 899]]))
        moves[dtype] = np.asarray(vectors - again, np.float32)
    wide, narrow = moves["float32"], moves["bfloat16"]
    assert np.linalg.norm(wide) > 0.05
    assert np.linalg.norm(narrow - wide) < 0.8 * np.linalg.norm(wide)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_the_gradients_are_those_of_float32(name):
    """But for rounding; also late in a long row."""
    batch = rows(name, "documents with images", "several images")
    late = replace(batch, position_BL=batch.position_BL + 8191)
    noise = noise_of(batch)
    found = []
    for dtype, packed in (("float32", batch), ("bfloat16", batch), ("bfloat16", late)):
        small = experiment(name)
        plan = tiny.planned(replace(small, model=replace(small.model, compute_dtype=dtype)))

        def mean(parameters, packed=packed, graph=plan.graph):
            net = nnx.merge(graph, parameters)
            weights, losses = net.weights(packed), net.losses(packed, noise, 16)
            sums = [(losses[k] * weights[k]).sum() / weights[k].sum().clip(1) for k in losses]
            return sum(sums)

        found.append(jax.jit(jax.value_and_grad(mean))(tiny.random_parameters(plan)))
    (loss, gradients), *narrow = found
    for its_loss, its_gradients in narrow:
        assert its_loss == pytest.approx(float(loss), rel=5e-3)
        for a, b in zip(*map(jax.tree.leaves, (gradients, its_gradients)), strict=True):
            assert np.linalg.norm(b - a) < 0.1 * np.linalg.norm(a)


def _alone(batch, noise: Noise, document: int):
    """One document of a row of several, moved to the start of an empty row."""
    L = packings.LENGTH
    here = np.flatnonzero(np.asarray(batch.segment_BL[0]) == document)
    at, n = int(here[0]), len(here)

    def moved(x):
        return jnp.zeros_like(x).at[0, :n].set(x[0, at : at + n])

    begin = np.asarray(batch.image_start_BM[0])
    slots = np.flatnonzero((begin >= at) & (begin < at + n))
    empty = np.full((1, len(begin)), L, np.int32)
    empty[0, : len(slots)] = begin[slots] - at
    order = jnp.asarray([*slots, *(s for s in range(len(begin)) if s not in slots)])
    alone = replace(
        batch,
        tokens_BL=moved(batch.tokens_BL),
        segment_BL=moved(batch.segment_BL).clip(0, 1),
        position_BL=moved(batch.position_BL),
        text_target_BL=moved(batch.text_target_BL),
        text_weight_BL=moved(batch.text_weight_BL),
        image_start_BM=jnp.asarray(empty),
        latents_BMhwc=batch.latents_BMhwc[:, order],
    )
    return alone, Noise(noise.t_BM[:, order], noise.noise_BMhwc[:, order])


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "linear")) for name in FAMILIES],
)
def test_trains_the_same_on_every_mesh(name):
    """Losses of eight devices, microbatched, are those of one; and they fall."""
    found = {}
    for mesh_config, devices in ((MeshConfig(data=1), 1), (MeshConfig(2, 2, 1, 2), 8)):
        asked = experiment(name, mesh=mesh_config)
        asked = replace(asked, data=replace(asked.data, batch_rows=8))
        mesh = make_mesh(mesh_config, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            planned = blueprint(asked, mesh)
            step, state = compiled_step(planned), planned.initialise()
            batch = Data(asked, tiny.TOKENIZER).batches()[0]
            values = []
            for _ in range(4):
                state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
                values.append([float(metrics[k]) for k in ("loss", "text_loss", "image_loss")])
        found[devices] = np.asarray(values)
    np.testing.assert_allclose(found[8], found[1], rtol=2e-4, atol=1e-5)
    assert found[1][-1, 0] < found[1][0, 0]
    assert (found[1][:, 2] > 0).all() == (name in WITH_IMAGES)


@pytest.mark.parametrize(
    "name", [pytest.param("unet", marks=pytest.mark.slow), "chameleon", "llama"]
)
def test_resumed_equals_uninterrupted(name, tmp_path):
    asked = experiment(name)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    planned = blueprint(asked, mesh)
    step = compiled_step(planned)
    batches = Data(asked, tiny.TOKENIZER).batches()

    def run(state, numbers):
        losses = []
        for number in numbers:
            state, metrics = step(state, jax.device_put(batches[number], batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
        return state, losses

    with jax.set_mesh(mesh):
        _, whole = run(planned.initialise(), range(4))
        half, first = run(planned.initialise(), range(2))
        saved = Checkpoints(tmp_path / "checkpoints", 2, print)
        saved.save(half, {})
        assert saved.wait()
        restored, _ = Checkpoints(tmp_path / "checkpoints", 2, print).restore(planned.abstract)
        _, second = run(restored, range(2, 4))
    assert first + second == whole


@pytest.mark.long
@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_codes_are_drawn_one_by_one_from_the_uncached_model(weight, temperature):
    """Guidance is on logits; random draws are a function of (key, place in the image)."""
    asked = experiment("chameleon", sampler=_sampling(weight, temperature))
    net, image, key = model("chameleon"), GRID, jax.random.key(5)
    prompt = [tiny.TOKENIZER.bos, 7, 9, tiny.TOKENIZER.boi]
    drawn, cache = _drawn(net, asked, prompt, key)

    def code_logits(before, codes):
        tokens = jnp.asarray([[*before, *(44 + c for c in codes)]], jnp.int32)
        empty = Context(net.new_cache(1, tokens.shape[1]), jnp.zeros((1,), jnp.int32), None)
        hidden, _ = net.extend(tokens, empty)
        return float32_product(hidden, net.output_DV[...])[0, -1, 44:]

    codes: list[int] = []
    for i in range(image.patches):
        given = code_logits(prompt, codes)
        without = code_logits([tiny.TOKENIZER.bos, tiny.TOKENIZER.boi], codes)
        logits = without + weight * (given - without)
        if temperature == 0:
            codes.append(int(jnp.argmax(logits)))
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
            codes.append(int(chosen))
    assert np.asarray(drawn[0]).reshape(-1).tolist() == codes
    tokens = jnp.asarray([[*prompt, *(44 + c for c in codes)]], jnp.int32)
    whole = Context(net.new_cache(1, 12), jnp.zeros((1,), jnp.int32), None)
    _, expected = net.extend(tokens, whole)
    for ours, theirs in ((cache.k, expected.k), (cache.v, expected.v)):
        n = tokens.shape[1]
        np.testing.assert_allclose(ours[:, :, :n], theirs[:, :, :n], atol=1e-5)


def _sampling(weight: float, temperature: float) -> SamplerConfig:
    sampling = tiny.small().sampler
    return replace(sampling, guidance=weight, image_temperature=temperature)


def _drawn(net: Model, asked: Experiment, prompt: list[int], key):
    tokens = jnp.asarray([prompt], jnp.int32)
    empty = Context(net.new_cache(1, 12), jnp.zeros((1,), jnp.int32), None)
    hidden, cache = net.extend(tokens, empty)
    length = jnp.asarray([len(prompt)], jnp.int32)
    keys = jnp.stack([key])
    state = jnp.asarray([IMAGE], jnp.int32)
    made = Rows(cache, length, tokens, jnp.ones_like(length), hidden[:, -1], state, keys)
    contrast = guidance(net, made, asked, tiny.TOKENIZER)
    drawn = net.draw(made.context, contrast, asked.sampler, keys)
    return drawn, net.show(drawn, made.context, 0)


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("name", ["chameleon", "unet", "causal"])
def test_the_engine_draws(name, candidates):
    plan = tiny.planned(experiment(name))
    parameters = tiny.talkative(tiny.random_parameters(plan))
    engine = Engine(plan.experiment, tiny.TOKENIZER, plan.graph, parameters)
    engine = engine.using(candidates=candidates)
    for spans in engine.generate([("5 3",), ("9 9 3",)], seed=1):
        images = [x for x in spans if isinstance(x, np.ndarray)]
        assert images and all(x.shape == plan.experiment.image.shape for x in images)
        if name == "chameleon":
            assert all(set(x.reshape(-1).tolist()) <= set(range(CODES)) for x in images)


def test_a_model_of_text_alone_never_begins_an_image():
    plan = tiny.planned(experiment("llama"))
    parameters = tiny.talkative(tiny.random_parameters(plan))
    engine = Engine(plan.experiment, tiny.TOKENIZER, plan.graph, parameters)
    spans = engine.generate([("5 3",), ("9 9 3",)], seed=1)
    assert all(isinstance(span, str) for answer in spans for span in answer)
    assert any(answer for answer in spans)


def test_the_loss_of_a_chameleon_is_one_mean_over_all_tokens():
    batch = rows("chameleon", "documents with images", "several images")
    net, asked = model("chameleon"), experiment("chameleon")
    tokens, code_follows = [], 0
    text = np.asarray(batch.text_weight_BL)
    for b in range(2):
        row = np.asarray(batch.tokens_BL[b]).tolist()
        for slot, begin in enumerate(np.asarray(batch.image_start_BM[b]).tolist()):
            if begin < packings.LENGTH:
                codes = np.asarray(batch.latents_BMhwc[b, slot]).reshape(-1).astype(int)
                row[begin : begin + 4] = (44 + codes).tolist()
        tokens.append(row)
    hidden, _ = net.read(batch, batch.image_start_BM, net.new_cache(2, packings.LENGTH))
    log_p = np.asarray(jax.nn.log_softmax(float32_product(hidden, net.output_DV[...])), np.float64)
    total = 0.0
    for b, i in np.ndindex(2, packings.LENGTH):
        following = tokens[b][i + 1] if i + 1 < packings.LENGTH else 0
        if following >= 44:
            total -= log_p[b, i, following]
            code_follows += 1
        elif text[b, i]:
            total -= log_p[b, i, int(batch.text_target_BL[b, i])]
    assert code_follows == 4 * int((batch.image_start_BM < packings.LENGTH).sum())
    got = batch_losses(net, batch, batch, noise_of(batch), asked.train)
    assert float(got.total) == pytest.approx(total / (code_follows + text.sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["linear", "chameleon", "llama"])
def test_z_loss_is_added_with_its_weight(name):
    batch, net = rows(name, "documents with images"), model(name)
    noise, train = noise_of(batch), experiment(name).train
    without = batch_losses(net, batch, batch, noise, train)
    with_it = batch_losses(net, batch, batch, noise, replace(train, z_loss=0.25))
    found, weights = losses(name, batch, noise), net.weights(batch)
    mean = float(jnp.sum(found["z"] * weights["z"]) / jnp.sum(weights["z"]))
    assert float(with_it.total) == pytest.approx(float(without.total) + 0.25 * mean, rel=1e-5)


def test_query_key_norm_heeds_no_scale_of_queries_and_keys():
    batch, net = rows("stable llama", "one text"), model("stable llama")
    graph, state = nnx.split(net, nnx.Param)
    values = nnx.to_pure_dict(state)
    attention = values["transformer"]["blocks"]["attention"]
    attention["q_DNH"] = 7.0 * attention["q_DNH"]
    attention["k_DKH"] = 0.2 * attention["k_DKH"]
    scaled = nnx.merge(graph, values)
    ours = losses("stable llama", batch, noise_of(batch))["text"]
    theirs = scaled.losses(batch, noise_of(batch), 16)["text"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("patch", [pytest.param(2, marks=pytest.mark.long), 4])
def test_the_work_of_a_unet_is_what_xla_counts(patch):
    """Multiplications of one image, against the FLOPs of the compiled encoder and decoder."""
    widths = (16, 32, 48)[: patch.bit_length()]
    config = ModelConfig(
        width=32, heads=4, compute_dtype="float32", patch_encoder="unet", unet_widths=widths
    )
    made = build(Experiment("t", image=ImageConfig(16, 16, 2, patch), model=config), 0)
    patches = made.patches
    each = patches.multiplications()
    count = each["image"] + each["patch"] * (16 // patch) ** 2

    def both(image, t, hidden):
        vectors, carried = patches.encode(image, t)
        return vectors, patches.decode(hidden, carried)

    image = jnp.zeros((1, 1, 16, 16, 2))
    hidden = jnp.zeros((1, 1, (16 // patch) ** 2, 32))
    lowered = jax.jit(both).lower(image, jnp.zeros((1, 1), jnp.int32), hidden)
    flops = lowered.compile().cost_analysis()["flops"]
    # XLA leaves out products with the zeros around an image, and adds norms and activations.
    assert 0.85 < flops / (2 * count) < 1.15


@pytest.mark.parametrize("name", FAMILIES)
def test_model_flops_are_six_per_weight_and_position(name):
    """Of a row of text alone: blocks at every position, logits at every target, attention."""
    plan = tiny.planned(experiment(name))
    batch = jax.tree.map(np.asarray, packings.batch(["t" * packings.LENGTH]))
    asked = replace(
        plan.experiment,
        data=DataConfig(row_length=packings.LENGTH, batch_rows=1),
        train=replace(plan.experiment.train, accumulation=1),
    )
    blocks = plan.abstract.parameters["transformer"]["blocks"]
    kernels = [blocks["attention"][k] for k in ("q_DNH", "k_DKH", "v_DKH", "out_NHD")]
    kernels += [blocks["mlp"][k] for k in ("gate_DF", "up_DF", "down_FD")]
    L, targets = packings.LENGTH, int((batch.text_weight_BL > 0).sum())
    head = plan.abstract.parameters["output_DV"].size
    expected = 6 * (sum(x.size for x in kernels) * L + head * targets)
    expected += 12 * asked.model.width * asked.model.layers * L * (L + 1) // 2
    mutual = asked.model.mutual_patches(asked.image)
    found = model_flops(plan.multiplications, asked, batch_work(batch, mutual))
    assert found == pytest.approx(expected)


BAD = [
    (dict(family="chameleon"), {}, "predicts one token after another"),
    (dict(family="chameleon", image_attention="causal"), {}, "needs the codes of a VQ autoencoder"),
    ({}, dict(image=GRID), "only a chameleon takes them"),
    (dict(patch_encoder="unet"), dict(image=ImageConfig(6, 6, 1, 3)), "a patch is 2, 4, 8"),
    (dict(patch_encoder="unet", unet_widths=(8,)), {}, "must be 2, one for each resolution"),
    (dict(patch_encoder="unet", timestep="after"), {}, "model.timestep is of linear patches"),
    (dict(unet_widths=(8, 8)), {}, "needs model.patch_encoder='unet'"),
    (
        dict(family="llama", image_attention="causal", patch_encoder="unet"),
        {},
        "for images that are diffused",
    ),
]


@pytest.mark.parametrize(("model_changes", "changes", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_does_not_fit_is_named(model_changes, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny.small(**model_changes), **changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [("llama", "trained on text alone"), ("chameleon", "needs the codes of a VQ autoencoder")],
)
def test_a_source_that_the_family_cannot_read_is_named(name, message):
    asked = experiment(name)
    side = dict(codes=0) if name == "llama" else dict(codes=CODES)
    image = ImageConfig(8, 8, 1, 1, **side)
    data = replace(asked.data, sources=(SourceConfig("digits"),), row_length=160)
    sampler = replace(asked.sampler, max_tokens=100)
    with pytest.raises(ValueError, match=message):
        Data(replace(asked, image=image, data=data, sampler=sampler), tiny.TOKENIZER)
