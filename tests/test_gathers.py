"""Parameters gathered from their shards in several steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from transfusion_jax.config import MeshConfig
from transfusion_jax.model.layers import project
from transfusion_jax.parallel import gathers
from transfusion_jax.parallel.gathers import gather_steps, gathered, on_rows
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import partition_spec


@pytest.mark.parametrize("devices", [2, 16, 32, 48, 64, 256, 512, 37])
def test_steps_of_a_gather_join_all_shards_in_order(devices):
    """Each device holds itself at first; a step concatenates what its group holds."""
    held = {device: [device] for device in range(devices)}
    for groups in gather_steps(devices):
        assert sorted(device for group in groups for device in group) == list(range(devices))
        assert all(len(group) <= 16 for group in groups) or devices == 37
        held = {
            device: [shard for member in group for shard in held[member]]
            for group in groups
            for device in group
        }
    assert all(shards == list(range(devices)) for shards in held.values())


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(1, 8),
        MeshConfig(2, 4),
        MeshConfig(1, 4, 2),
        MeshConfig(1, 2, 4),
        MeshConfig(1, 4, 1, 2),
    ],
)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), ("norm", "mlp")])
def test_a_gather_in_steps_is_the_gather_in_one(monkeypatch, mesh, axes):
    value = jax.random.normal(jax.random.key(0), (16, 16))
    factor = jax.random.normal(jax.random.key(1), (16, 16))

    def gradient(value):
        def total(value):
            parameter = nnx.Param(value, out_sharding=axes, eager_sharding=False)
            return jnp.sum(jnp.sin(gathered(parameter, jnp.float32)) * factor)

        return total(value), jax.grad(total)(value)

    devices = make_mesh(mesh, jax.devices())
    placed = jax.device_put(value, NamedSharding(devices, partition_spec(axes)))
    with jax.set_mesh(devices):
        whole = jax.jit(lambda value: gradient(value))(placed)
        monkeypatch.setattr(gathers, "TOGETHER", 2)
        stepped = jax.jit(lambda value: gradient(value))
        text = stepped.lower(placed).as_text()
        stepped = stepped(placed)
    assert ("all_gather" in text) == ("embed" in axes)
    np.testing.assert_allclose(stepped[0], whole[0], rtol=1e-6)
    np.testing.assert_array_equal(stepped[1], whole[1])
    np.testing.assert_allclose(whole[1], jnp.cos(value) * factor, rtol=1e-5)


STEPPED = [MeshConfig(1, 8), MeshConfig(2, 4)]
LEFT_TO_XLA = MeshConfig(1, 4, 1, 2)


def in_one_and_in_steps(monkeypatch, mesh, axes, gradients, value, x):
    """`gradients(value, x)` summed over devices in one step and in several, and the program that
    does the latter."""
    devices = make_mesh(mesh, jax.devices())
    placed = jax.device_put(value, NamedSharding(devices, partition_spec(axes)))
    rows = jax.device_put(x, NamedSharding(devices, partition_spec(("batch",))))
    with jax.set_mesh(devices):
        whole = jax.jit(lambda *arrays: gradients(*arrays))(placed, rows)
        monkeypatch.setattr(gathers, "TOGETHER", 2)
        stepped = jax.jit(lambda *arrays: gradients(*arrays))
        return whole, stepped(placed, rows), stepped.lower(placed, rows).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [*STEPPED, LEFT_TO_XLA])
@pytest.mark.parametrize(
    "shape, axes, contracted",
    [
        ((16, 4, 8), ("embed", "heads", "head_dim"), 1),
        ((4, 8, 16), ("heads", "head_dim", "embed"), 2),
        ((16, 24), ("norm", "mlp"), 1),
    ],
)
def test_sums_in_steps_are_the_sums_in_one(monkeypatch, mesh, shape, axes, contracted, dtype):
    kernel = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (8, 3, *shape[:contracted]), dtype)

    def gradients(kernel, x):
        def total(kernel, x):
            parameter = nnx.Param(kernel, out_sharding=axes, eager_sharding=False)
            return jnp.sum(jnp.sin(project(x, parameter, contracted)))

        return jax.grad(total, argnums=(0, 1))(kernel, x)

    whole, stepped, text = in_one_and_in_steps(monkeypatch, mesh, axes, gradients, kernel, x)
    assert ("reduce_scatter" in text) == ("embed" in axes and mesh != LEFT_TO_XLA)
    error = 1e-5 if dtype == "float32" else 0.05
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(np.float32), b.astype(np.float32), rtol=error, atol=error
        ),
        stepped,
        whole,
    )


@pytest.mark.parametrize("mesh", STEPPED)
@pytest.mark.parametrize("axes", [("embed", "vocab"), ("vocab", "embed")])
def test_rows_add_up_to_one_gradient_in_steps(monkeypatch, mesh, axes):
    """A loop over chunks sums over devices once, behind it."""
    value = jax.random.normal(jax.random.key(0), (16, 16))
    x = jax.random.normal(jax.random.key(1), (8, 6, 16))

    def gradients(value, x):
        def chunk(value, x):
            return jax.lax.scan(lambda _, x: (None, jnp.sin(x @ value)), None, x.swapaxes(0, 1))

        def total(value, x):
            parameter = nnx.Param(value, out_sharding=axes, eager_sharding=False)
            return jnp.sum(
                on_rows(lambda *args: chunk(*args)[1].swapaxes(0, 1), parameter, x.dtype, x)
            )

        return jax.grad(total, argnums=(0, 1))(value, x)

    whole, stepped, text = in_one_and_in_steps(monkeypatch, mesh, axes, gradients, value, x)
    assert "reduce_scatter" in text
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), stepped, whole
    )
