"""`train.freeze`: which parameters are not trained, and that nothing happens to them."""

import importlib.util
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from transfusion_jax.commands.main import main
from transfusion_jax.config import MeshConfig
from transfusion_jax.data.pipeline import Data
from transfusion_jax.model.work import Work, model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.planning.plan import abstract_batch
from transfusion_jax.planning.program import read_program
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.training.checkpoint import Checkpoints
from transfusion_jax.training.frozen import frozen_names, like, merged, without

pytestmark = pytest.mark.one_jax

ONE = MeshConfig(data=1)
PATTERNS = ("embedding_VD", "transformer.blocks.mlp.*", "*norm*")
NAMES = ["embedding_VD", "layers.q", "layers.norm.scale", "layers.mlp.up", "norm.scale"]


def frozen_experiment(patterns=PATTERNS, **changes):
    small = tiny.small()
    return replace(small, train=replace(small.train, freeze=patterns, **changes))


def planned_on(experiment, mesh_config=ONE, devices=1):
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    return mesh, blueprint(replace(experiment, mesh=mesh_config), mesh)


def take(mesh, planned, steps, state=None, step=None):
    """A state some steps later, and the losses."""
    losses = []
    with jax.set_mesh(mesh):
        step = step or compiled_step(planned)
        state = planned.initialise() if state is None else state
        batches = Data(planned.experiment, tiny.TOKENIZER).batches()
        for number in range(int(state.step), int(state.step) + steps):
            state, metrics = step(state, jax.device_put(batches[number], batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return state, losses


def named(tree) -> dict[str, np.ndarray]:
    flat = jax.tree.flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in flat}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (("layers.q",), {"layers.q"}),
        (("layers.*",), {"layers.q", "layers.norm.scale", "layers.mlp.up"}),
        (("*norm*", "embedding_VD"), {"layers.norm.scale", "norm.scale", "embedding_VD"}),
        (("layers.?",), {"layers.q"}),
    ],
)
def test_patterns_are_those_of_files(patterns, expected):
    assert frozen_names(NAMES, patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("layer.q",), "'layer.q' matches no parameter; perhaps you meant layers.q"),
        (("layers",), r"'layers' matches no parameter; perhaps you meant layers.*"),
        (("zzz",), "'zzz' matches no parameter, as embedding_VD would"),
        (("layers.q", "QQQ"), "'QQQ' matches no parameter"),
        (("*",), "leaves no parameter to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_named(patterns, message):
    with pytest.raises(ValueError, match=message):
        frozen_names(NAMES, patterns)


def test_trees_without_a_part_and_with_another():
    tree = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    part = without(tree, {"a.b", "d.e"})
    assert part == {"a": {"c": 2}}
    assert like({"a": {"b": 5, "c": 6}, "d": {"e": 7}}, part) == {"a": {"c": 6}}
    assert merged(tree, {"a": {"c": 9}}) == {"a": {"b": 1, "c": 9}, "d": {"e": 3}}
    assert without(4, {"a"}) == 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_and_their_average_keep_their_bits(kind):
    """Minus zero too, which adding nothing would change; the others all change."""
    experiment = frozen_experiment()
    optimizer = replace(experiment.optimizer, kind=kind)
    mesh, planned = planned_on(replace(experiment, optimizer=optimizer))
    parameters = tiny.random_parameters(planned)
    parameters["embedding_VD"] = parameters["embedding_VD"].at[0].set(-0.0)
    before = named(jax.tree.map(jnp.copy, parameters))
    after, _ = take(mesh, planned, 4, tiny.fresh_state(planned, parameters))
    assert planned.frozen == {n for n in before if "norm" in n or "mlp" in n or "embedding" in n}
    for found in (named(after.parameters), named(after.ema)):
        for name, value in found.items():
            same = value.tobytes() == before[name].tobytes()
            assert same == (name in planned.frozen), name


@pytest.mark.long
def test_the_others_take_the_step_that_they_would_take_anyway():
    """One step, without clipping, whose norm is of all gradients."""
    found = {}
    for patterns in ((), PATTERNS):
        experiment = frozen_experiment(patterns)
        experiment = replace(experiment, optimizer=replace(experiment.optimizer, clip_norm=1e9))
        mesh, planned = planned_on(experiment)
        state = tiny.fresh_state(planned, tiny.random_parameters(planned))
        found[patterns] = named(take(mesh, planned, 2, state)[0].parameters)
        frozen = planned.frozen
    # The rate of the first update is 0; at the second one, nothing had changed before.
    for name in found[()].keys() - frozen:
        np.testing.assert_allclose(found[PATTERNS][name], found[()][name], rtol=1e-5, atol=1e-6)


def test_the_optimizer_has_no_memory_of_what_is_frozen():
    _, planned = planned_on(frozen_experiment())
    flat = jax.tree.flatten_with_path(planned.abstract.parameters)[0]
    sizes = {".".join(str(key.key) for key in path): x.size for path, x in flat}
    trained = sum(n for name, n in sizes.items() if name not in planned.frozen)
    moments = sum(x.size for x in jax.tree.leaves(planned.abstract.optimizer) if x.ndim)
    assert moments == 2 * trained
    assert planned.trained == trained < planned.parameters == sum(sizes.values())


@pytest.mark.long
def test_gradients_of_what_is_frozen_are_not_computed():
    """The step has fewer FLOPs by 2 for each frozen weight and vector: as model FLOPs say."""
    flops, counted = {}, {}
    patterns = ("transformer.blocks.mlp.*",)
    for frozen in ((), patterns):
        experiment = frozen_experiment(frozen, accumulation=1)
        experiment = replace(experiment, model=replace(experiment.model, remat="none"))
        mesh, planned = planned_on(experiment)
        with jax.set_mesh(mesh):
            batch = abstract_batch(planned.experiment, mesh)
            compiled = compiled_step(planned).lower(planned.abstract, batch).compile()
        flops[frozen] = read_program(compiled.as_text(), unknown_trips=1).flops
        counted[frozen] = model_flops(
            planned.multiplications, experiment, Work(0, 0, 0), planned.trained_multiplications
        )
    mlp = planned.abstract.parameters["transformer"]["blocks"]["mlp"]
    positions = experiment.data.batch_rows * experiment.data.row_length
    saved = 2 * positions * sum(x.size for x in jax.tree.leaves(mlp))
    assert flops[()] - flops[patterns] == pytest.approx(saved)
    assert counted[()] - counted[patterns] == pytest.approx(saved)


@pytest.mark.long
def test_a_mesh_changes_nothing():
    experiment = frozen_experiment()
    experiment = replace(experiment, data=replace(experiment.data, batch_rows=8))
    _, one = take(*planned_on(experiment), 3)
    _, eight = take(*planned_on(experiment, MeshConfig(2, 2, 1, 2), 8), 3)
    np.testing.assert_allclose(eight, one, rtol=2e-4)


def test_resumed_equals_uninterrupted(tmp_path):
    mesh, planned = planned_on(frozen_experiment())
    step = compiled_step(planned)
    _, whole = take(mesh, planned, 4, step=step)
    half, first = take(mesh, planned, 2, step=step)
    saved = Checkpoints(tmp_path / "checkpoints", 2, print)
    saved.save(half, {})
    assert saved.wait()
    restored, _ = Checkpoints(tmp_path / "checkpoints", 2, print).restore(planned.abstract)
    _, second = take(mesh, planned, 2, restored, step)
    assert first + second == whole


EXPERIMENT = """
from transfusion_jax.config import *

def config():
    return Experiment(
        name="tiny",
        image=ImageConfig(8, 8, 1, 2),
        model=ModelConfig(layers=1, width=32, heads=2, mlp_width=32, vocab_size=512,
                          compute_dtype="float32"),
        data=DataConfig(sources=(SourceConfig("digits"),), row_length=64, batch_rows=8),
        tokenizer=TokenizerConfig(vocab_size=480),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=2, vocab_chunk=64, checkpoint_every=1),
        sampler=SamplerConfig(steps=2, max_tokens=24),
    )
"""


@pytest.mark.long
def test_the_command_line(tmp_path, capsys):
    """A pattern that matches nothing is bad input; so is another pattern when a run is resumed."""
    file, run = tmp_path / "tiny.py", tmp_path / "run"
    file.write_text(EXPERIMENT)
    line = ["train", str(file), "--run-dir", str(run), "--mesh.data", "8", "--train.freeze"]
    assert main([*line, "transformer.block.*"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "perhaps you meant transformer.blocks.*" in error
    assert not run.exists()
    assert main([*line, "transformer.*", "output_DV"]) == 0
    assert "frozen" in (said := capsys.readouterr().out) and "transformer.*, output_DV" in said
    assert main([*line, "transformer.*", "--train.steps", "2"]) == 2
    assert "train.freeze" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="plans need libtpu")
def test_a_plan_shows_the_smaller_memory(tmp_path, capsys):
    file, plans = tmp_path / "tiny.py", {}
    file.write_text(EXPERIMENT.replace("layers=1, width=32", "layers=4, width=256"))
    for name, words in {"all": [], "some": ["--train.freeze", "transformer.*"]}.items():
        out = tmp_path / f"{name}.json"
        line = ["plan", str(file), "--topology", "v5e:2x2", "--json", str(out), *words]
        assert main(line) == 0
        plans[name] = json.loads(out.read_text())
        assert ("of them trained" in capsys.readouterr().out) == bool(words)
    assert plans["all"]["trained_parameters"] == plans["all"]["parameters"]
    frozen = plans["some"]["parameters"] - plans["some"]["trained_parameters"]
    saved = [plans[name]["bytes_per_chip"]["arguments"] for name in ("all", "some")]
    assert math.isclose(saved[0] - saved[1], 8 * frozen, rel_tol=0.02)
