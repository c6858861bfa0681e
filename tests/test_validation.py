"""Validation against a direct evaluation of the losses, whatever the batch, the mesh, the seed."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transfusion_jax.config import MeshConfig
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.errors import Stopped
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.validation import Validation, timesteps, validator
from transfusion_jax.training.metrics import read_metrics
from transfusion_jax.training.observation import nothing

ROWS = 5
ONE = MeshConfig(data=1)


@pytest.fixture(scope="module")
def small(experiment):
    model = replace(experiment.model, layers=1, width=32, heads=2, kv_heads=2, mlp_width=32)
    train = replace(experiment.train, validate_every=10, validation_rows=ROWS)
    diffusion = replace(experiment.diffusion, noise_limit=300)
    sampler = replace(experiment.sampler, context_timestep=400)
    return replace(experiment, model=model, train=train, diffusion=diffusion, sampler=sampler)


def measured(experiment, tokenizer, parameters=None, mesh_config=ONE):
    """What validation measures of some parameters (by default, those of step 0), and these."""
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    planned = blueprint(replace(experiment, mesh=mesh_config), mesh)
    validation = Validation(Data(experiment, tokenizer, "held_out"), planned, mesh)
    with jax.set_mesh(mesh):
        parameters = planned.initialise().ema if parameters is None else parameters
    parameters = jax.device_put(
        parameters, jax.tree.map(lambda x: x.sharding, planned.abstract.ema)
    )
    values = validation.measure(parameters, nothing)
    assert validation.measure(parameters, nothing) == values
    return values, jax.device_get(parameters)


@pytest.fixture(scope="module")
def values(small, tokenizer):
    return measured(small, tokenizer)


def direct(experiment, tokenizer, parameters) -> dict[str, float]:
    """The same by the definitions: cross-entropy of logits beside finished images, squared errors
    of predictions at timesteps that training draws."""
    model = nnx.merge(blueprint(experiment, make_mesh(ONE, jax.devices()[:1])).graph, parameters)
    data = Data(experiment, tokenizer, "held_out")

    @jax.jit
    def outputs(batch, noisy, t):
        t_BM = jnp.full_like(batch.image_start_BM, t)
        hidden_BLD, predicted_BMhwc = model(batch, noisy, t_BM)
        return model.logits(hidden_BLD), predicted_BMhwc

    found = {}
    for n, source in enumerate(data.sources):
        count = min(ROWS, len(source))
        chosen = [int((i + 0.5) / count * len(source)) for i in range(count)]
        rows = [data.row(source, r, np.random.default_rng((n, r))) for r in chosen]
        batch = stack(rows)
        logits, _ = outputs(batch, batch.latents_BMhwc, jnp.int32(400))
        log_p = np.asarray(jax.nn.log_softmax(logits))
        picked = np.take_along_axis(log_p, batch.text_target_BL[..., None], -1)[..., 0]
        weight = batch.text_weight_BL
        found[f"validation/{source.name}/text_loss"] = -(picked * weight).sum() / weight.sum()
        if not batch.image_weight_BM.sum():
            continue
        errors = []
        for i, t in enumerate((62, 187, 312, 437, 562, 687, 812, 937)):
            key = jax.random.fold_in(jax.random.key(0), n)
            keys = [jax.random.fold_in(jax.random.fold_in(key, r), i) for r in chosen]
            shape = batch.latents_BMhwc.shape[1:]
            noise = np.stack([jax.random.normal(k, shape) for k in keys])
            schedule, at = model.process.schedule, jnp.int32(t)
            noisy = schedule.alpha(at) * batch.latents_BMhwc + schedule.sigma(at) * noise
            _, predicted = outputs(batch, noisy, at)
            error_BM = np.square(predicted - noise).mean((2, 3, 4))
            weight_BM = batch.image_weight_BM * (batch.image_limit_BM > t)
            assert 0 < weight_BM.sum() and (t < 300) == (weight_BM == batch.image_weight_BM).all()
            errors.append((error_BM * weight_BM).sum() / weight_BM.sum())
        found[f"validation/{source.name}/image_loss"] = np.mean(errors)
    return found


def test_it_is_the_loss_of_held_out_rows_by_source(small, tokenizer, values):
    measured, parameters = values
    expected = direct(small, tokenizer, parameters)
    assert set(measured) == {
        "validation/digits/text_loss",
        "validation/digits/image_loss",
        "validation/sums/text_loss",
    }
    assert measured == pytest.approx(expected, rel=2e-5)
    assert timesteps(small.diffusion.steps)[0] == 62


@pytest.mark.parametrize(
    ("batch_rows", "mesh_config"),
    [(2, ONE), (16, MeshConfig(data=2, fsdp=4))],
)
def test_neither_batch_nor_mesh_nor_seed_change_it(
    small, tokenizer, values, batch_rows, mesh_config
):
    other = replace(
        small,
        data=replace(small.data, batch_rows=batch_rows),
        train=replace(small.train, seed=7, steps=30),
    )
    found, _ = measured(other, tokenizer, values[1], mesh_config)
    assert found == pytest.approx(values[0], rel=1e-5)


def test_the_average_is_measured_when_it_is_due(small, tokenizer, values):
    mesh = make_mesh(ONE, jax.devices()[:1])
    observer = validator(blueprint(small, mesh), mesh, tokenizer)
    state = SimpleNamespace(ema=jax.device_put(values[1], jax.devices()[0]), parameters=None)
    assert observer.look(10, state, nothing).values == values[0]
    assert [s for s in range(1, 26) if observer.due(s, 25)] == [10, 20, 25]


def test_a_stop_is_heard_before_every_batch(small, tokenizer, values):
    few = replace(small, data=replace(small.data, batch_rows=2))
    mesh = make_mesh(ONE, jax.devices()[:1])
    validation = Validation(Data(few, tokenizer, "held_out"), blueprint(few, mesh), mesh)
    parameters = jax.device_put(values[1], jax.devices()[0])
    points = []

    def moved():
        points.append(len(points))
        if len(points) == 3:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped, match="SIGTERM"):
        validation.measure(parameters, moved)
    assert validation.measure(parameters, moved) == pytest.approx(values[0], rel=1e-5)
    rows = [min(ROWS, len(source)) for source in validation.data.sources]
    assert len(points) == 3 + sum(-(-count // 2) for count in rows) > 6


def test_no_held_out_rows_are_refused(small, tokenizer, monkeypatch):
    monkeypatch.setattr("transfusion_jax.data.pipeline.PlannedSource.__len__", lambda source: 0)
    mesh = make_mesh(ONE, jax.devices()[:1])
    with pytest.raises(ValueError, match="validate_every=10: no held-out rows in digits, sums"):
        validator(blueprint(small, mesh), mesh, tokenizer)


EXPERIMENT = """
from dataclasses import replace
from runpy import run_path

def config():
    base = run_path({digits!r})["config"]()
    return replace(
        base,
        name="tiny",
        model=replace(base.model, layers=1, width=32, heads=2, mlp_width=64),
        data=replace(base.data, batch_rows=4),
        optimizer=replace(base.optimizer, warmup_steps=2),
        train=replace(
            base.train,
            steps=4,
            log_every=1,
            validate_every=2,
            validation_rows=6,
            sample_every=2,
            sample_prompts=("a three",),
        ),
        sampler=replace(base.sampler, steps=2, max_tokens=60),
        evaluation=(),
    )
"""


def start(path, count: int) -> list[subprocess.Popen]:
    """`train` in so many processes of one device each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{found.getsockname()[1]}"
    command = [sys.executable, "-m", "transfusion_jax", "train", "tiny.py", "--run-dir", str(count)]
    joined = ["--coordinator", at, "--num-processes", str(count), "--process-id"]
    return [
        subprocess.Popen(
            [*command, *([*joined, str(number)] if count > 1 else [])],
            cwd=path,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


@pytest.mark.slow
def test_two_processes_measure_and_sample_as_one(tmp_path):
    digits = Path(__file__).parents[1] / "experiments" / "digits.py"
    (tmp_path / "tiny.py").write_text(EXPERIMENT.format(digits=str(digits)))
    for count in (1, 2):
        for process in start(tmp_path, count):
            said, _ = process.communicate(timeout=200)
            assert process.returncode == 0, said
    one, two = (read_metrics(tmp_path / name) for name in ("1", "2"))
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for ours, theirs in zip(one, two, strict=True):
        names = [name for name in ours if "loss" in name]
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-5)
        assert ("validation/digits/image_loss" in theirs) == (theirs["step"] % 2 == 0)
    for name in ("goodput.json", "metrics.jsonl"):
        assert (tmp_path / "2" / name).exists()
    assert len(list((tmp_path / "2" / "tensorboard").iterdir())) == 1  # one process writes
