"""The arithmetic of an update, against closed forms and NumPy."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.autoencoder.config import tiny
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.config import MeshConfig, OptimizerConfig
from transfusion_jax.model.build import abstract_model
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.training.state import State, initial_fields
from transfusion_jax.training.update import (
    _in_layers,
    accumulated,
    advance,
    average,
    decayed,
    descend,
    learning_rate,
    make_optimizer,
    matrices,
    step_key,
    updated,
)

STEPS, WARMUP = 10, 4
CONFIG = OptimizerConfig(
    learning_rate=0.1,
    final_learning_rate=0.02,
    warmup_steps=WARMUP,
    epsilon=0.1,  # so large that the size of a gradient matters, and with it how it is clipped
    weight_decay=0.3,
    clip_norm=1.0,
)


def wanted_rate(updates):
    if updates < WARMUP:
        return 0.1 * updates / WARMUP
    share = min((updates - WARMUP) / (STEPS - WARMUP), 1)
    return 0.02 + 0.08 * (1 + math.cos(math.pi * share)) / 2


def test_the_rate_warms_up_and_decays_to_the_end_of_the_run():
    rate = learning_rate(CONFIG, STEPS)
    found = [float(rate(jnp.int32(n))) for n in range(STEPS + 4)]
    np.testing.assert_allclose(found, [wanted_rate(n) for n in range(STEPS + 4)], rtol=1e-6)
    # From 0 to the peak, half-way down in the middle of the decay, and the floor at the end.
    np.testing.assert_allclose([found[n] for n in (0, 4, 7, 10, 13)], [0, 0.1, 0.06, 0.02, 0.02])


def test_without_a_warm_up_the_first_rate_is_the_peak():
    rate = learning_rate(replace(CONFIG, warmup_steps=0), STEPS)
    assert float(rate(jnp.int32(0))) == pytest.approx(0.1)


def two_parameters():
    """A matrix, and the scales of two stacked norms."""
    rng = np.random.default_rng(0)
    matrix = nnx.Param(
        jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        out_sharding=("embed", "mlp"),
        eager_sharding=False,
    )
    scale = nnx.Param(jnp.ones((2, 3)), out_sharding=("layers", "norm"), eager_sharding=False)
    return nnx.State({"matrix": matrix, "scale": scale})


def gradients():
    """Longer than the clipping norm, and shorter, in turn; with values of very different sizes."""
    rng = np.random.default_rng(1)
    sizes = np.array([0.01, 1.0, 4.0])
    for step in range(8):
        size = 3.0 if step % 2 == 0 else 0.05
        yield {
            "matrix": (size * sizes[:, None] * rng.normal(size=(3, 2))).astype(np.float32),
            "scale": (size * sizes * rng.normal(size=(2, 3))).astype(np.float32),
        }


def adamw(parameters, start=0):
    """Clip, AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) and decay, in NumPy."""
    decay = {"matrix": CONFIG.weight_decay, "scale": 0.0}
    m = {name: np.zeros_like(p) for name, p in parameters.items()}
    v = {name: np.zeros_like(p) for name, p in parameters.items()}
    lengths = []
    for count, gradient in enumerate(gradients()):
        length = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        lengths.append(length)
        for name, p in parameters.items():
            g = gradient[name] * min(1.0, CONFIG.clip_norm / length)
            m[name] = CONFIG.b1 * m[name] + (1 - CONFIG.b1) * g
            v[name] = CONFIG.b2 * v[name] + (1 - CONFIG.b2) * g**2
            first = m[name] / (1 - CONFIG.b1 ** (count + 1))
            second = v[name] / (1 - CONFIG.b2 ** (count + 1))
            step = first / (np.sqrt(second) + CONFIG.epsilon) + decay[name] * p
            parameters[name] = p - wanted_rate(count + start) * step
    assert min(lengths) < CONFIG.clip_norm < max(lengths)
    return parameters


@pytest.mark.parametrize("start", [0, 3])
def test_the_optimizer_is_clipped_adamw_that_decays_matrices(start):
    optimizer = make_optimizer(CONFIG, STEPS, two_parameters(), start)
    parameters = nnx.to_pure_dict(two_parameters())
    wanted = adamw({name: np.asarray(p, np.float64) for name, p in parameters.items()}, start)
    moments = optimizer.init(parameters)
    for gradient in gradients():
        parameters, moments = descend(optimizer, gradient, moments, parameters)
    for name in parameters:
        np.testing.assert_allclose(parameters[name], wanted[name], rtol=1e-5, atol=1e-6)


def layers():
    """Parameters whose names say how Muon is to take them, two layers each, and their gradients."""
    rng = np.random.default_rng(2)
    shapes = {
        "in_DNH": ((2, 5, 3, 2), ("layers", "embed", "heads", "head_dim")),
        "out_NHD": ((2, 3, 2, 5), ("layers", "heads", "head_dim", "embed")),
        "up_DF": ((2, 4, 7), ("layers", "embed", "mlp")),
        "scale": ((2, 4), ("layers", "norm")),
        "embedding_VD": ((9, 4), ("vocab", "embed")),
    }
    parameters = {
        name: nnx.Param(jnp.ones(shape), out_sharding=names, eager_sharding=False)
        for name, (shape, names) in shapes.items()
    }
    drawn = {name: rng.normal(size=shape) for name, (shape, _) in shapes.items()}
    return nnx.State(parameters), {name: np.float32(g) for name, g in drawn.items()}


def test_muon_makes_the_updates_of_matrices_in_layers_orthogonal():
    parameters, gradient = layers()
    before = nnx.to_pure_dict(parameters)
    config = replace(CONFIG, kind="muon", warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(config, STEPS, parameters)
    after, _ = descend(optimizer, gradient, optimizer.init(before), before)
    for name in ("scale", "embedding_VD"):
        # The first update of Adam with Nesterov's momentum (Dozat 2016), in closed form.
        g = gradient[name]
        first = config.b1 * g / (1 + config.b1) + (1 - config.b1) * g / (1 - config.b1)
        wanted = config.learning_rate * first / (abs(g) + config.epsilon)
        np.testing.assert_allclose(before[name] - after[name], wanted, rtol=1e-4)
    for name, inputs in (("in_DNH", 5), ("out_NHD", 6), ("up_DF", 4)):
        change = np.asarray(before[name] - after[name]) / config.learning_rate
        for layer in range(2):
            step = change[layer].reshape(inputs, -1)
            u, _, vh = np.linalg.svd(gradient[name][layer].reshape(step.shape), full_matrices=False)
            # Of all matrices whose singular values are one, U V^T is nearest to the gradient; five
            # iterations of Newton and Schulz bring them between 0.7 and 1.2.
            size = 0.2 * math.sqrt(max(step.shape))
            assert np.linalg.norm(step / size - u @ vh, 2) < 0.35
        sizes = np.sqrt(np.mean(np.square(change)))
        assert 0.1 < sizes < 0.3  # as AdamW's


def test_muon_lets_decay_what_adamw_lets_decay():
    """Without gradients all that is left is the decay, of rate times `weight_decay`."""
    parameters, gradient = layers()
    before = nnx.to_pure_dict(parameters)
    config = replace(CONFIG, kind="muon", warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, STEPS, parameters)
    nothing = {name: np.zeros_like(g) for name, g in gradient.items()}
    after, _ = descend(optimizer, nothing, optimizer.init(before), before)
    for name, value in after.items():
        wanted = 1.0 if name == "scale" else 1 - config.learning_rate * 0.5
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mesh_config", "deals"),
    [
        (MeshConfig(data=2, fsdp=1, sequence=4), "data"),
        (MeshConfig(data=1, fsdp=2, sequence=4), "fsdp"),
        (MeshConfig(data=4, fsdp=2, sequence=1), "fsdp"),  # copies of the parameters do the same
        (MeshConfig(data=1, fsdp=4, sequence=2), None),  # four do not divide two layers
        (MeshConfig(data=2, fsdp=1, tensor=4), None),  # they share each product already
        (MeshConfig(data=1, fsdp=1, sequence=8), None),  # every one would do all
    ],
    ids=str,
)
def test_devices_have_whole_layers_of_muon_where_that_saves_work(mesh_config, deals):
    parameters, gradient = layers()
    with jax.set_mesh(make_mesh(mesh_config)):
        traced = str(jax.make_jaxpr(lambda g: _in_layers(matrices(parameters), g))(gradient))
    assert traced.count("sharding_constraint") == (3 if deals else 0)
    assert traced.count(f"('{deals}',)") == (3 if deals else 0)


def test_muon_is_refused_where_there_are_no_layers():
    with pytest.raises(ValueError, match="muon.*finds no layers"):
        make_optimizer(replace(CONFIG, kind="muon"), STEPS, two_parameters())


def decay_by_name(parameters):
    """Whether each parameter decays, by its dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(decayed(parameters))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def test_norm_scales_of_the_model_do_not_decay_and_all_else_does(experiment):
    learned = replace(
        experiment, model=replace(experiment.model, patch_position="learned", timestep="after")
    )
    found = decay_by_name(abstract_model(learned)[1])
    kept = {name for name, decays in found.items() if not decays}
    assert kept == {name for name in found if name.endswith("norm.scale")}
    blocks = "transformer.blocks"
    assert {f"{blocks}.attention_norm.scale", f"{blocks}.mlp_norm.scale"} < kept
    assert {"embedding_VD", "output_DV", "patches.in_ZD"} < set(found) - kept


def test_biases_and_norms_of_the_autoencoder_do_not_decay():
    found = decay_by_name(abstract_autoencoder(tiny())[1])
    kinds = {name.split(".")[-1]: decays for name, decays in found.items()}
    assert kinds == {"kernel": True, "bias": False, "scale": False}


def test_the_average_is_quick_at_first_and_slow_later():
    def share(updates, decay=0.99):
        """Of the new weights in the average."""
        found = average({"x": jnp.zeros(2)}, {"x": jnp.ones(2)}, jnp.int32(updates), decay)
        return float(found["x"][0])

    np.testing.assert_allclose(share(0), 0.9)
    np.testing.assert_allclose(share(1), 9 / 11, rtol=1e-6)
    np.testing.assert_allclose(share(90), 0.09, rtol=1e-5)
    for updates in (891, 10_000):
        np.testing.assert_allclose(share(updates), 0.01, rtol=1e-4)
    np.testing.assert_allclose(share(10_000, decay=0.0), 1.0)


def state_at(step, skipped=0):
    optimizer = make_optimizer(CONFIG, STEPS, two_parameters())
    state = State(**initial_fields(nnx.to_pure_dict(two_parameters()), optimizer))
    counts = {"step": jnp.int32(step), "skipped": jnp.int32(skipped)}
    return optimizer, replace(state, **counts, skipped_in_a_row=jnp.int32(min(skipped, 1)))


def test_the_average_counts_updates_not_steps():
    """After skipped steps it is as quick as it would be without them."""
    gradient = next(gradients())
    found = []
    for step, skipped in ((5, 0), (9, 4)):
        optimizer, state = state_at(step, skipped)
        state = replace(state, ema=jax.tree.map(jnp.zeros_like, state.ema))
        found.append(updated(state, optimizer, gradient, 0.99)["ema"])
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(
    "loss, norm, others, taken",
    [
        (1.0, 1.0, (), True),
        (math.nan, 1.0, (), False),
        (1.0, math.nan, (), False),
        (math.inf, 1.0, (), False),
        (1.0, math.inf, (), False),
        (1.0, 1.0, (1.0, math.nan), False),
        (1.0, 1.0, (1.0, 2.0), True),
    ],
)
def test_a_step_is_taken_only_if_loss_and_gradients_are_finite(loss, norm, others, taken):
    optimizer, state = state_at(step=5, skipped=2)
    new = updated(state, optimizer, next(gradients()), 0.9)
    found, counts = advance(state, new, *map(jnp.float32, (loss, norm, *others)))
    for name, tree in new.items():
        wanted = tree if taken else getattr(state, name)
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), wanted)
    assert not np.array_equal(new["ema"]["matrix"], state.ema["matrix"])
    wanted = (6, 2, 0) if taken else (6, 3, 2)
    assert (int(found.step), int(found.skipped), int(found.skipped_in_a_row)) == wanted
    assert {name: int(n) for name, n in counts.items()} == {
        "skipped": wanted[1],
        "skipped_in_a_row": wanted[2],
    }


def test_every_step_and_seed_draws_anew():
    draws = [
        float(jax.random.normal(step_key(seed, jnp.int32(step))))
        for seed in (0, 1)
        for step in range(4)
    ]
    assert len(set(draws)) == 8
    assert draws[2] == float(jax.random.normal(step_key(0, jnp.int32(2))))


def test_microbatches_are_strided_rows_and_are_added_up():
    """Of six rows and three microbatches: rows 0 and 3, 1 and 4, 2 and 5."""
    rows = jnp.arange(6.0), jnp.arange(12.0).reshape(6, 2)

    def function(x, y):
        assert x.shape == (2,) and y.shape == (2, 2)
        return {"x": jnp.prod(x), "y": jnp.sum(y)}

    zero = {"x": jnp.zeros(()), "y": jnp.zeros(())}
    found = accumulated(function, rows, 3, zero)
    assert float(found["x"]) == 0 * 3 + 1 * 4 + 2 * 5 and float(found["y"]) == 66
