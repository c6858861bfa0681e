"""A Transfusion with U-Net patches on every mesh, and under every remat policy, against one device
that recomputes nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import packings
import pytest
import tiny
from flax import nnx

from transfusion_jax.config import Experiment, MeshConfig
from transfusion_jax.diffusion.process import Noise
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.objective import batch_losses
from transfusion_jax.pretraining.state import blueprint

NAMES = ("documents with images", "several images", "image at both ends", "full row")
ROWS = [packings.PACKINGS[name] for name in NAMES]
ROWS += ["t" * 16 + "I" + "t" * 5, "|".join(["tI"] * 6), "I" * 6, "tttt|t"]


def experiment(**changes) -> Experiment:
    base = tiny.small(patch_encoder="unet", unet_widths=(16, 32), unet_blocks=2)
    return replace(base, model=replace(base.model, **changes))


def batch():
    return jax.tree.map(jnp.asarray, packings.batch(ROWS))


def loss_of(asked: Experiment):
    """The loss of the rows as a function of parameters and rows."""
    graph = tiny.planned(asked).graph

    def loss(parameters, rows):
        t = jnp.arange(rows.image_start_BM.size, dtype=jnp.int32).reshape(rows.image_start_BM.shape)
        noise = Noise(t, jax.random.normal(jax.random.key(2), rows.latents_BMhwc.shape))
        model = nnx.merge(graph, parameters)
        return batch_losses(model, rows, rows, noise, asked.train).total

    return loss


@functools.cache
def alone():
    """Parameters, and the loss and gradient of one device that recomputes nothing."""
    asked = experiment(remat="none")
    parameters = tiny.random_parameters(tiny.planned(asked))
    return parameters, *jax.jit(jax.value_and_grad(loss_of(asked)))(parameters, batch())


def assert_same(found: tuple) -> None:
    _, loss, gradient = alone()
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-5)
    for (path, value), ours in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(found[1]), strict=True
    ):
        largest = np.abs(value).max()
        assert largest > 0, path
        np.testing.assert_allclose(ours, value, rtol=2e-3, atol=2e-5 * largest, err_msg=str(path))


@pytest.mark.long
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(data=1, fsdp=8), marks=pytest.mark.slow),
        pytest.param(dict(data=2, sequence=4), marks=pytest.mark.slow),
        pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
        dict(data=1, fsdp=2, sequence=2, tensor=2),
    ],
    ids=lambda axes: " ".join(f"{name}={n}" for name, n in axes.items()),
)
def test_rows_cut_over_devices_give_the_gradient_of_one_device(axes):
    """Also where a cut goes through an image."""
    asked, config = experiment(), MeshConfig(**axes)
    parts = config.sequence * config.tensor
    begin = np.asarray(batch().image_start_BM)
    begin = begin[begin < packings.LENGTH]
    end, shard = begin + packings.P - 1, packings.LENGTH // parts
    assert (begin // shard < end // shard).any() == (parts > 1)
    mesh = make_mesh(config, jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = blueprint(
            replace(asked, mesh=config, data=replace(asked.data, batch_rows=16)), mesh
        ).abstract.parameters
        parameters = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), alone()[0], placed)
        rows = jax.device_put(batch(), batch_sharding(mesh))
        assert_same(jax.jit(jax.value_and_grad(loss_of(asked)))(parameters, rows))


@pytest.mark.long
@pytest.mark.parametrize("unet_loop", ["scan", "unroll"])
@pytest.mark.parametrize(
    ("remat", "layer_loop"),
    [
        ("full", "scan"),
        ("none", "unroll"),
        pytest.param("none", "scan", marks=pytest.mark.slow),
        pytest.param("minimal", "scan", marks=pytest.mark.slow),
        pytest.param("minimal", "unroll", marks=pytest.mark.slow),
        pytest.param("attention", "scan", marks=pytest.mark.slow),
    ],
)
def test_what_is_recomputed_and_looped_over_changes_no_gradient(remat, layer_loop, unet_loop):
    asked = experiment(remat=remat, layer_loop=layer_loop, unet_loop=unet_loop)
    parameters = alone()[0]
    assert_same(jax.jit(jax.value_and_grad(loss_of(asked)))(parameters, batch()))
