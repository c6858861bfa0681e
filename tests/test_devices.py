"""A model that generates on several devices, as it was trained, and one that is kept narrow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from transfusion_jax.config import MeshConfig, stored
from transfusion_jax.evaluation.likelihood import likelihood
from transfusion_jax.evaluation.summary import summarise
from transfusion_jax.generation.engine import load_engine
from transfusion_jax.training.checkpoint import Checkpoints
from transfusion_jax.training.goodput import Account

PROMPTS = [("three plus four is",), ("a nine",), ("the sum",)]
REQUESTS = [PROMPTS[i % 3] for i in range(7)]  # no number of devices divides them


def weights(plan, tokenizer):
    """Random ones, under which "a nine" is followed by an image, and text ends seldom."""
    parameters = tiny.random_parameters(plan, 1)
    draw = tokenizer.encode("a nine")[-1]
    embedding = (0.1 * parameters["embedding_VD"]).at[draw].multiply(20.0)
    output = parameters["output_DV"].at[:, tokenizer.eos].multiply(0.3)
    output = output.at[:, tokenizer.boi].set(0.2 * embedding[draw])
    return {**parameters, "embedding_VD": embedding, "output_DV": output}


def saved(directory, experiment, tokenizer):
    """A run directory of such weights."""
    plan = tiny.planned(experiment)
    state = tiny.fresh_state(plan, weights(plan, tokenizer))
    directory.mkdir()
    (directory / "config.json").write_text(stored.dumps(experiment))
    (directory / "tokenizer.model").write_bytes(tokenizer.model)
    checkpoints = Checkpoints(directory / "checkpoints", 1, print)
    checkpoints.save(state, {})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory, experiment, tokenizer):
    experiment = replace(experiment, mesh=MeshConfig(data=1))
    return saved(tmp_path_factory.mktemp("devices") / "run", experiment, tokenizer)


@pytest.fixture(scope="module")
def alone(run):
    """On one device: what the engine answers, and how likely it finds held-out rows."""
    said = []
    engine, _ = load_engine(run, said.append)
    assert "do not fit the 8 devices" in said[0] and "using one device" in said[0]
    return engine.generate(REQUESTS, 5), likelihood(engine, run, 20)


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "tensor": 2, "sequence": 2},
        pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_many_devices_answer_as_one_does(run, alone, mesh):
    engine, _ = load_engine(run, print, mesh)
    cut = engine.parameters["transformer"]["blocks"]["attention"]["q_DNH"]
    assert len(cut.sharding.device_set) == 8
    assert cut.addressable_shards[0].data.size * (8 // mesh["data"]) == cut.size
    answers, measured = engine.generate(REQUESTS, 5), likelihood(engine, run, 20)
    drawn = 0
    for spans, expected in zip(answers, alone[0], strict=True):
        assert [type(span) for span in spans] == [type(span) for span in expected]
        for span, other in zip(spans, expected, strict=True):
            if isinstance(span, str):
                assert span == other
            else:
                drawn += 1
                np.testing.assert_allclose(span, other, atol=1e-3)
    assert drawn
    assert measured["text_perplexity"] == pytest.approx(alone[1]["text_perplexity"], rel=1e-4)


@pytest.mark.slow
def test_weights_in_the_compute_dtype_give_the_same_bits(tmp_path, experiment, tokenizer):
    narrow = replace(
        experiment,
        model=replace(experiment.model, compute_dtype="bfloat16"),
        mesh=MeshConfig(data=1),
    )
    run = saved(tmp_path / "run", narrow, tokenizer)
    engine, _ = load_engine(run, print)
    kinds = {x.dtype for x in jax.tree.leaves(engine.parameters)}
    assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    wide = weights(tiny.planned(narrow), tokenizer)
    placed = jax.device_put(wide, jax.tree.map(lambda x: x.sharding, engine.parameters))
    for a, b in zip(
        jax.tree.leaves(engine.generate(PROMPTS, 5)),
        jax.tree.leaves(replace(engine, parameters=placed).generate(PROMPTS, 5)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_loaded_when_there_is_nothing_to_evaluate(tmp_path, experiment, tokenizer):
    (tmp_path / "config.json").write_text(stored.dumps(replace(experiment, evaluation=())))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    summary = summarise(tmp_path, 1.5, Account(), print)  # there is no checkpoint to load
    parameters = tiny.planned(replace(experiment, mesh=MeshConfig(data=1))).parameters
    assert (summary["parameters"], summary["steps"]) == (parameters, 40)
