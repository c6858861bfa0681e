"""`model.experts="modality"`: whose weights a position multiplies, and that it costs nothing more.

That packed equals unpacked, cached equals uncached and eight devices equal one is in
`test_families.py`; what is read into a cache takes another way to the right weights there.
"""

import functools
import importlib.util
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
import tiny
from exported import flat, run_directory, weights
from flax import nnx
from test_export_safetensors import tiny_experiment
from test_initial import export, start

from transfusion_jax.commands.main import main
from transfusion_jax.config import MeshConfig
from transfusion_jax.data.pipeline import Data
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.model.grouped import Groups, block_count, product
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.planning.plan import abstract_batch
from transfusion_jax.planning.program import read_program
from transfusion_jax.pretraining.objective import batch_losses
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step

pytestmark = pytest.mark.one_jax

STABLE = {"qk_norm": True, "norm_placement": "post"}
TEXT_AND_IMAGE = (("blocks", "image_blocks"), ("norm", "image_norm"))
ROWS = ("documents with images", "one text", "image at both ends", "padding")


def experiment(experts: str = "modality", **changes):
    return tiny.small(experts=experts, **changes)


def rows(*names: str):
    return jax.tree.map(jnp.asarray, packings.batch([packings.PACKINGS[n] for n in names]))


def noise_of(batch) -> Noise:
    t = np.random.default_rng(0).integers(0, 100, batch.image_start_BM.shape)
    noise = jax.random.normal(jax.random.key(2), batch.latents_BMhwc.shape)
    return Noise(jnp.asarray(t, jnp.int32), noise)


def loss_of(asked, batch, part: str = "total"):
    """The loss of a batch as a function of parameters."""
    graph, noise = tiny.planned(asked).graph, noise_of(batch)

    def loss(parameters):
        found = batch_losses(nnx.merge(graph, parameters), batch, batch, noise, asked.train)
        return getattr(found, part)

    return loss


@functools.cache
def parameters(asked) -> dict:
    return tiny.random_parameters(tiny.planned(asked))


def leaves(tree) -> dict[str, np.ndarray]:
    flat = jax.tree.flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in flat}


def test_blocks_are_enough_for_every_share_of_images():
    for positions in (1, 2, 31, 32, 33, 95, 96, 100, 1000):
        blocks, block = block_count(positions)
        needed = [-(-n // block) + -(-(positions - n) // block) for n in range(positions + 1)]
        assert max(needed) <= blocks <= -(-positions // block) + 1
    blocks, block = block_count(10**6)
    assert block == 1024 and blocks * block <= 1.002 * 10**6


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_groups_are_of_one_modality_and_come_back(share):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((3, 70)) < share)
    x = jnp.asarray(rng.standard_normal((3, 70, 5)), jnp.float32)
    groups = Groups.of(image)
    kind = np.asarray(groups.ordered(1 + image[..., None].astype(jnp.int32)))[
        ..., 0
    ]  # 0 where there is nothing
    for block, of_images in zip(kind, np.asarray(groups.image_C), strict=True):
        assert set(block.tolist()) <= {0, 1 + of_images}
    assert (kind > 0).sum() == image.size
    np.testing.assert_array_equal(groups.back(groups.ordered(x), image.shape), x)
    weight = jnp.asarray(rng.standard_normal((3, 70, 5)), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(weight * groups.back(groups.ordered(x) ** 2, (3, 70))))(x)
    np.testing.assert_allclose(gradient, 2 * weight * x, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_their_gradients_are_those_of_the_position_s_kernel(dtype):
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.random((2, 50)) < 0.4)
    x, weight = (jnp.asarray(rng.standard_normal((2, 50, n)), dtype) for n in (6, 12))
    kernels = jnp.asarray(rng.standard_normal((2, 6, 4, 3)), dtype)

    def ours(x, kernels):
        groups = Groups.of(image)
        return groups.back(product(groups.image_C, kernels, groups.ordered(x)), image.shape)

    def simply(x, kernels):
        both = jnp.einsum("bld,kdnh->kblnh", x, kernels)
        return jnp.where(image[..., None, None], both[1], both[0])

    def gradients(f):
        loss = lambda x, k: jnp.sum(f(x, k).reshape(2, 50, 12) * weight).astype(jnp.float32)  # noqa: E731
        return jax.grad(loss, (0, 1))(x, kernels)

    tolerance = {"float32": 1e-5, "bfloat16": 4e-2}[dtype]
    wanted = simply(x, kernels), *gradients(simply)
    for got, expected in zip((ours(x, kernels), *gradients(ours)), wanted, strict=True):
        a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.long
@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow), STABLE], ids=["llama", "stable"]
)
def test_with_two_equal_sets_of_weights_it_is_the_dense_model(changes):
    """Losses are equal, and the gradients of the dense model are the sums of those of the two."""
    asked, dense = experiment(**changes), experiment("shared", **changes)
    values = parameters(dense)
    own = {**values["transformer"]}
    for text, image in TEXT_AND_IMAGE:
        own[image] = own[text]
    mixed = {**values, "transformer": own}
    batch = rows(*ROWS)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(asked, batch)))(mixed)
    expected, dense_gradient = jax.jit(jax.value_and_grad(loss_of(dense, batch)))(values)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    added = dict(gradient["transformer"])
    for text, image in TEXT_AND_IMAGE:
        added[text] = jax.tree.map(jnp.add, added[text], added.pop(image))
    got, wanted = leaves({**gradient, "transformer": added}), leaves(dense_gradient)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=2e-5 * np.abs(value).max())


@pytest.mark.long
def test_text_alone_has_no_gradient_of_the_weights_of_images_nor_the_other_way():
    asked = experiment(**STABLE)
    text = jax.jit(jax.grad(loss_of(asked, rows("several documents"))))(parameters(asked))
    # A picture that nothing comes before: it sees patches alone.
    image = jax.jit(jax.grad(loss_of(asked, rows("image at both ends"), "image")))
    for name, value in leaves(text["transformer"]).items():
        assert (np.abs(value).max() > 0) == (not name.startswith("image_")), name
    only = replace(
        rows("one image"), image_start_BM=jnp.full((1, packings.SLOTS), 36).at[0, 0].set(0)
    )
    kinds = jnp.asarray([[1] * 4 + [0] * 32], jnp.int32)
    only = replace(
        only, segment_BL=kinds, text_weight_BL=jnp.zeros((1, 36)), tokens_BL=0 * only.tokens_BL
    )
    image = jax.jit(jax.grad(loss_of(asked, only)))(parameters(asked))
    for name, value in leaves(image["transformer"]).items():
        assert (np.abs(value).max() > 0) == name.startswith("image_"), name


@functools.cache
def step_flops(experts: str, remat: str) -> float:
    asked = experiment(experts)
    asked = replace(asked, model=replace(asked.model, remat=remat))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        planned = blueprint(asked, mesh)
        batch = abstract_batch(asked, mesh)
        compiled = compiled_step(planned).lower(planned.abstract, batch).compile()
    return read_program(compiled.as_text(), unknown_trips=1).flops


@pytest.mark.long
@pytest.mark.parametrize(
    "remat", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "minimal")), "full"]
)
def test_a_step_has_the_flops_of_the_dense_model(remat):
    """But for one block in 33 that may be empty; a step's shapes do not depend on its rows."""
    ratio = step_flops("modality", remat) / step_flops("shared", remat)
    assert 1.0 <= ratio <= 1 + 1 / 31
    assert step_flops("modality", "none") < step_flops("modality", "full")


def test_a_model_has_the_flops_of_the_dense_model_and_twice_the_weights():
    mixed, dense = (tiny.planned(experiment(x)) for x in ("modality", "shared"))
    assert mixed.multiplications == dense.multiplications
    twice = sum(
        x.size for part in TEXT_AND_IMAGE
        for x in jax.tree.leaves(dense.abstract.parameters["transformer"][part[0]])
    )  # fmt: skip
    assert mixed.parameters == dense.parameters + twice


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh_config",
    [pytest.param(MeshConfig(1, 2, 2, 2), marks=pytest.mark.slow), MeshConfig(2, 1, 4, 1)],
    ids=["2x2x2", "2x4"],
)
def test_rows_cut_over_devices_give_the_same_gradients(mesh_config):
    """Also where a cut goes through an image."""
    asked = experiment(**STABLE)
    batch = rows(*ROWS)
    function = jax.value_and_grad(loss_of(asked, batch))
    loss, gradient = jax.jit(function)(parameters(asked))
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        placed = blueprint(replace(asked, mesh=mesh_config), mesh).abstract.parameters
        cut = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), parameters(asked), placed)
        batch = jax.device_put(batch, batch_sharding(mesh))
        got, got_gradient = jax.jit(jax.value_and_grad(loss_of(asked, batch)))(cut)
    assert float(got) == pytest.approx(float(loss), rel=1e-5)
    for name, value in leaves(gradient).items():
        found = leaves(got_gradient)[name]
        np.testing.assert_allclose(found, value, rtol=2e-3, atol=1e-5 * np.abs(value).max())


@pytest.mark.long
def test_with_the_text_frozen_text_alone_keeps_its_loss_bit_for_bit():
    """LMFusion: images are learned, and the text model stays what it was."""
    asked = experiment()
    freeze = ("embedding_VD", "output_DV", "transformer.blocks.*", "transformer.norm.*")
    asked = replace(asked, train=replace(asked.train, freeze=freeze))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    text = rows("several documents", "one text", "several documents", "one text")
    text_loss = jax.jit(loss_of(asked, text, "text"))
    image_loss = jax.jit(loss_of(asked, rows(*ROWS), "image"))
    with jax.set_mesh(mesh):
        planned = blueprint(asked, mesh)
        state = tiny.fresh_state(planned, tiny.random_parameters(planned))
        before = jax.tree.map(np.asarray, state.parameters)
        step, batches = compiled_step(planned), Data(asked, tiny.TOKENIZER).batches()
        for number in range(4):
            state, _ = step(state, jax.device_put(batches[number], batch_sharding(mesh)))
    for after in (state.parameters, state.ema):
        assert float(text_loss(after)) == float(text_loss(before))
        assert float(image_loss(after)) != float(image_loss(before))


def test_it_is_for_diffused_images():
    with pytest.raises(ValueError, match="experts='modality' is for images that are diffused"):
        experiment(family="llama", image_attention="causal")


@pytest.mark.parametrize("source", ["llama", "linear"])
def test_the_weights_of_images_start_as_those_of_text(source, tmp_path):
    """From an export of text alone, or of a dense model, whose patches are then kept."""
    theirs, ours = tiny_experiment(source), tiny_experiment("mixture")
    out = export(run_directory(tmp_path / "run", theirs), tmp_path / "out")
    said = []
    state, _ = start(out, ours, said=said)
    assert any("the weights of images start as those of text" in line for line in said)
    expected, found = flat(weights(theirs, 3)), flat(jax.device_get(state.parameters))
    assert any(name.startswith("transformer.image_blocks.") for name in found)
    for name, value in found.items():
        if (text := name.replace("transformer.image_", "transformer.")) in expected:
            np.testing.assert_array_equal(value, expected[text])
        else:
            assert source == "llama" and name.startswith("patches.")


EXPERIMENT = """
from dataclasses import replace
from transfusion_jax.config import *

def sweep():
    for experts in ("shared", "modality"):
        yield Experiment(
            name=experts,
            image=ImageConfig(16, 16, 8, 2),
            model=ModelConfig(layers=2, width=256, heads=2, mlp_width=512, vocab_size=512,
                              experts=experts, remat="none", attention="dense"),
            data=DataConfig(row_length=512, batch_rows=8),
            mesh=MeshConfig(data=2, fsdp=1, tensor=2),
        )
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="plans need libtpu")
def test_a_plan_says_so(tmp_path):
    file, plans = tmp_path / "mixture.py", {}
    file.write_text(EXPERIMENT)
    for experts in ("shared", "modality"):
        out = tmp_path / f"{experts}.json"
        words = ["--topology", "v5e:2x2", "--json", str(out)]
        assert main(["plan", f"{file}:{experts}", *words]) == 0
        plans[experts] = json.loads(out.read_text())
    dense, mixed = plans["shared"], plans["modality"]
    assert mixed["model_flops_per_step"] == dense["model_flops_per_step"]
    ratio = mixed["hardware_flops_per_step"] / dense["hardware_flops_per_step"]
    assert 0.99 <= ratio <= 1.04
    assert mixed["parameters"] > 1.5 * dense["parameters"]
