import json
import math
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from transfusion_jax.config import MeshConfig
from transfusion_jax.data.pipeline import Data
from transfusion_jax.parallel import gathers
from transfusion_jax.parallel.mesh import make_mesh, process_rows
from transfusion_jax.parallel.rules import batch_sharding, partition_spec
from transfusion_jax.planning.hlo import parse
from transfusion_jax.planning.plan import abstract_batch
from transfusion_jax.planning.program import read_program
from transfusion_jax.pretraining.objective import batch_losses
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step
from transfusion_jax.training.checkpoint import Checkpoints
from transfusion_jax.training.metrics import MetricsLog, read_metrics
from transfusion_jax.training.watchdog import TrainingFailed, check_finite

ONE = MeshConfig(data=1)


def build(experiment, mesh_config=ONE):
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    return mesh, blueprint(replace(experiment, mesh=mesh_config), mesh)


def run(experiment, tokenizer, mesh_config, steps, state=None):
    """Losses of some steps, and the state after them."""
    mesh, planned = build(experiment, mesh_config)
    return take(mesh, planned, compiled_step(planned), experiment, tokenizer, steps, state)


def take(mesh, planned, step, experiment, tokenizer, steps, state=None):
    with jax.set_mesh(mesh):
        state = planned.initialise() if state is None else state
        sharding = batch_sharding(mesh)
        batches = Data(experiment, tokenizer).batches()
        losses = []
        start = int(state.step)
        for s in range(start, start + steps):
            state, metrics = step(state, jax.device_put(batches[s], sharding))
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
    return losses, state


@pytest.fixture(scope="module")
def one(experiment):
    """Mesh of one device, blueprint, compiled step."""
    mesh, planned = build(experiment)
    return mesh, planned, compiled_step(planned)


@pytest.fixture(scope="module")
def single(one, experiment, tokenizer):
    return take(*one, experiment, tokenizer, 20)


@pytest.fixture(scope="module")
def batch(one, experiment, tokenizer):
    return jax.device_put(Data(experiment, tokenizer).batches()[0], batch_sharding(one[0]))


def test_training_learns_and_advances_everything(single, experiment):
    losses, state = single
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    assert int(state.step) == 20 and int(state.skipped) == 0
    counts = [int(x) for x in jax.tree.leaves(state.optimizer) if x.ndim == 0]
    assert counts and all(count == 20 for count in counts)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim > 0]
    assert len(moments) == 2 * len(jax.tree.leaves(state.parameters))
    assert all(float(jnp.abs(m).max()) > 0 for m in moments)
    apart = jax.tree.map(lambda p, e: float(jnp.abs(p - e).max()), state.parameters, state.ema)
    assert all(0 < d < 1 for d in jax.tree.leaves(apart))


@pytest.mark.parametrize(
    "mesh_config",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2, sequence=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
        MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    ],
    ids=str,
)
def test_meshes_train_like_one_device(single, experiment, tokenizer, mesh_config):
    losses, state = run(experiment, tokenizer, mesh_config, 20)
    np.testing.assert_allclose(losses, single[0], rtol=1e-4)
    if mesh_config.fsdp == 1:
        return
    # Parameters, average and both moments: each device holds its share, norms and the timestep's
    # odd ends aside.
    for tree in (state.parameters, state.ema, state.optimizer):
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        share = total * mesh_config.data / 8
        assert here < (1.1 if mesh_config.tensor == 1 else 1.25) * share


@pytest.mark.long
def test_sums_in_steps_train_like_one_device(single, experiment, tokenizer, monkeypatch):
    """As on more devices than `TOGETHER`."""
    monkeypatch.setattr(gathers, "TOGETHER", 2)
    losses, _ = run(experiment, tokenizer, MeshConfig(data=2, fsdp=4), 20)
    np.testing.assert_allclose(losses, single[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, changes, error",
    [
        ("optimizer", {"kind": "muon"}, 1e-4),
        ("train", {"freeze": ("transformer.*",)}, 1e-4),
        ("train", {"accumulation": 2}, 1e-4),
        ("model", {"compute_dtype": "bfloat16"}, 2e-3),
    ],
    ids=["muon", "frozen", "accumulation", "bfloat16"],
)
def test_sums_in_steps_go_with(experiment, tokenizer, monkeypatch, part, changes, error):
    changed = replace(experiment, data=replace(experiment.data, batch_rows=16))
    changed = replace(changed, **{part: replace(getattr(changed, part), **changes)})
    alone, _ = run(changed, tokenizer, ONE, 4)
    monkeypatch.setattr(gathers, "TOGETHER", 2)
    stepped, _ = run(changed, tokenizer, MeshConfig(data=1, fsdp=8), 4)
    np.testing.assert_allclose(stepped, alone, rtol=error)


@pytest.mark.long
def test_muon_trains_on_a_mesh_like_on_one_device(experiment, tokenizer):
    changed = replace(experiment, optimizer=replace(experiment.optimizer, kind="muon"))
    alone, _ = run(changed, tokenizer, ONE, 6)
    mesh = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)
    losses, state = run(changed, tokenizer, mesh, 6)
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    moments = jax.tree.leaves(state.optimizer)
    here = sum(x.addressable_shards[0].data.nbytes for x in moments)
    assert here < 1.25 * sum(x.nbytes for x in moments) / 8


@pytest.mark.slow
def test_devices_share_the_products_of_muon(experiment, tokenizer):
    """Eight devices, eight layers."""
    deep = replace(experiment, model=replace(experiment.model, layers=8))
    muon = replace(deep, optimizer=replace(deep.optimizer, kind="muon"))
    eight = MeshConfig(data=8)
    flops = {
        (name, mesh): read_program(program_text(config, mesh), unknown_trips=2).flops
        for name, config in (("adamw", deep), ("muon", muon))
        for mesh in (ONE, eight)
    }
    alone = flops["muon", ONE] - flops["adamw", ONE]
    shared = flops["muon", eight] - flops["adamw", eight]
    assert shared == pytest.approx(alone / 8, rel=0.02)
    losses, _ = run(muon, tokenizer, eight, 4)
    np.testing.assert_allclose(losses, run(muon, tokenizer, ONE, 4)[0], rtol=1e-4)


@pytest.mark.parametrize(
    "parts, mesh_config",
    [
        (4, ONE),
        pytest.param(2, ONE, marks=pytest.mark.slow),
        pytest.param(4, MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    single, experiment, tokenizer, parts, mesh_config
):
    """Rows differ in how much text and how many images they have, so a mean of the parts' means
    would not do."""
    batch = Data(experiment, tokenizer).batches()[0]
    images = [batch.image_weight_BM[part::parts].sum() for part in range(parts)]
    assert min(images) < max(images)
    parted = replace(experiment, train=replace(experiment.train, accumulation=parts))
    losses, _ = run(parted, tokenizer, mesh_config, 20)
    np.testing.assert_allclose(losses, single[0], rtol=1e-4)


def program_text(experiment, mesh_config):
    """The compiled step of an experiment."""
    mesh, planned = build(experiment, mesh_config)
    with jax.set_mesh(mesh):
        lowered = compiled_step(planned).lower(planned.abstract, abstract_batch(experiment, mesh))
        return lowered.compile().as_text()


@pytest.mark.long
def test_positions_that_are_cut_share_the_work(experiment):
    """Eight devices that cut rows in four compute no more, each, than eight that have rows of their
    own."""
    flops = [
        read_program(program_text(experiment, MeshConfig(data=1, fsdp=8 // n, sequence=n)), 2).flops
        for n in (1, 4)
    ]
    assert flops[1] < 1.1 * flops[0]


@pytest.mark.long
def test_a_step_computes_again_what_is_not_kept(experiment):
    """Under `minimal` no product: neither those with parameters nor those of attention."""

    def flops(remat):
        config = replace(experiment, model=replace(experiment.model, remat=remat))
        return read_program(program_text(config, ONE), unknown_trips=2).flops

    full, attention, minimal, none = map(flops, ("full", "attention", "minimal", "none"))
    assert none == pytest.approx(minimal, rel=1e-3)
    assert minimal < attention < full


@pytest.mark.long
def test_layers_that_are_written_out_are_in_no_loop(experiment):
    def loops(layer_loop):
        # Dense attention has no loops of its own.
        changes = dict(attention="dense", remat="minimal", layer_loop=layer_loop)
        model = replace(experiment.model, **changes)
        return program_text(replace(experiment, model=model), ONE).count(" while(")

    assert loops("unroll") == loops("scan") - 2  # forward and backward


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh_config",
    [ONE, pytest.param(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), marks=pytest.mark.slow)],
    ids=["one", "eight"],
)
def test_the_logits_of_all_positions_never_exist(experiment, mesh_config):
    """No array of the compiled step has the size of B x L x V on a device, unless a chunk is a
    whole row."""

    def largest(chunk):
        parted = replace(experiment, train=replace(experiment.train, vocab_chunk=chunk))
        text = program_text(parted, mesh_config)
        instructions = (
            x for computation in parse(text).values() for x in computation.instructions.values()
        )
        return max(math.prod(array.dims) for x in instructions for array in x.result)

    rows, length, vocabulary = (
        experiment.data.batch_rows,
        experiment.data.row_length,
        experiment.model.vocab_size,
    )
    here = rows * length * vocabulary // (1 if mesh_config == ONE else 8)
    assert largest(24) < here <= largest(length)


def test_the_state_is_donated(one, batch):
    mesh, planned, step = one
    with jax.set_mesh(mesh):
        state = planned.initialise()
        step(state, batch)
    assert all(
        x.is_deleted() for x in jax.tree.leaves((state.parameters, state.ema, state.optimizer))
    )


def test_timesteps_and_noise_are_drawn_anew_at_every_step(one, batch):
    mesh, planned, step = one
    with jax.set_mesh(mesh):
        initial = planned.initialise()
        losses = []
        for number in (0, 1, 0):  # the same parameters and the same rows, at two steps
            state = replace(jax.tree.map(jnp.copy, initial), step=jnp.int32(number))
            losses.append(float(step(state, batch)[1]["image_loss"]))
    assert losses[0] == losses[2] and abs(losses[1] / losses[0] - 1) > 1e-4


NAN_GRADIENT, NAN_LOSS = 7.0, 8.0  # marks of a batch


def marked_losses(model, microbatch, batch, noise, train):
    """The objective; for a marked batch, either the loss or its gradients are NaN."""
    losses = batch_losses(model, microbatch, batch, noise, train)
    mark = batch.latents_BMhwc[0, 0, 0, 0, 0]
    root = jnp.sqrt(jnp.where(mark == NAN_GRADIENT, 0.0 * losses.total, 1.0)) - 1.0
    missing = jnp.where(mark == NAN_LOSS, jnp.nan, 0.0)
    return replace(losses, total=losses.total + root + missing)


def test_a_step_that_is_not_finite_in_loss_or_gradients_is_skipped(experiment, batch, monkeypatch):
    monkeypatch.setattr("transfusion_jax.pretraining.step.batch_losses", marked_losses)
    mesh, planned = build(experiment)

    def marked(mark):
        return replace(batch, latents_BMhwc=batch.latents_BMhwc.at[0, 0, 0, 0, 0].set(mark))

    with jax.set_mesh(mesh):
        step = compiled_step(planned)
        state, _ = step(planned.initialise(), batch)
        before = jax.device_get((state.parameters, state.ema, state.optimizer))
        for expected, mark in enumerate((NAN_GRADIENT, NAN_LOSS, jnp.nan), start=1):
            state, metrics = step(state, marked(mark))
            assert math.isfinite(metrics["loss"]) == (mark == NAN_GRADIENT)
            assert math.isfinite(metrics["grad_norm"]) == (mark == NAN_LOSS)
            assert int(metrics["skipped_in_a_row"]) == int(metrics["skipped"]) == expected
        after = jax.device_get((state.parameters, state.ema, state.optimizer))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        state, metrics = step(state, batch)
    assert int(metrics["skipped_in_a_row"]) == 0
    assert int(metrics["skipped"]) == 3 and int(state.step) == 5


def test_training_stops_after_ten_skips_in_a_row():
    check_finite(100, 9, 10)
    with pytest.raises(TrainingFailed, match="10 steps in a row"):
        check_finite(101, 10, 10)


@pytest.mark.long
def test_a_checkpoint_restores_on_another_mesh_and_trains_on(
    single, experiment, tokenizer, tmp_path
):
    losses, _ = single
    _, state = run(experiment, tokenizer, MeshConfig(data=1, fsdp=4, tensor=2), 10)
    saved = Checkpoints(tmp_path / "checkpoints", 3, print)
    saved.save(state, {"train_seconds": 1.5, "data": ["x"]})
    assert saved.wait()
    _, planned = build(experiment, MeshConfig(data=2, fsdp=2, tensor=2))
    restored, _ = saved.restore(planned.abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))
    wanted = jax.tree.leaves(planned.abstract)
    assert all(
        x.sharding == w.sharding for x, w in zip(jax.tree.leaves(restored), wanted, strict=True)
    )
    more, _ = run(experiment, tokenizer, MeshConfig(data=2, fsdp=2, tensor=2), 10, restored)
    np.testing.assert_allclose(more, losses[10:], rtol=1e-4)
    saved.close()


def test_metrics_are_cut_back_to_the_step_of_a_resumed_run(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": step / 3})
    log.write({"step": 6, "loss": math.nan})
    log.close()
    assert read_metrics(tmp_path)[-1] == {"step": 6, "loss": None}
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    before = path.stat().st_ino
    MetricsLog(tmp_path, 3).close()
    assert path.stat().st_ino == before  # a full disk has no room for another
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[1])["loss"] == 2 / 3


def test_rows_after_a_full_disk_are_whole_and_what_was_lost_is_said(tmp_path, monkeypatch):
    said = []
    log = MetricsLog(tmp_path, 0, said.append)
    log.write({"step": 1, "loss": 1.0})
    write, left = os.pwrite, [10]

    def full(file, content, offset):
        """There is room for a few bytes more."""
        if not left:
            raise OSError(28, "No space left on device")
        return write(file, content[: left.pop()], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        log.write({"step": 2, "loss": 2.0})
        log.write({"step": 3, "loss": 3.0})
    log.write({"step": 4, "loss": 4.0})
    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "write_event", lambda *_: full(0, b"", 0))
        log.write({"step": 5, "loss": 5.0})
    log.write({"step": 6, "loss": 6.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4, 5, 6]
    assert [line.split(" to ")[0] for line in said] == [
        "could not write the metrics of step 2",
        "could not write the metrics of step 5",
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # the first ends in the middle


def test_mesh_errors_name_what_does_not_fit(experiment):
    with pytest.raises(ValueError, match=r"mesh\.fsdp=3.* do not fit the 8 devices"):
        make_mesh(MeshConfig(data=1, fsdp=3))
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "sequence": 1,
        "tensor": 2,
    }
    with pytest.raises(ValueError, match=r"batch_rows=12 is not divisible by the 8 shards"):
        process_rows(batch_sharding(make_mesh(MeshConfig(8))), 12)
    with pytest.raises(ValueError, match="does not divide"):
        blueprint(
            replace(experiment, model=replace(experiment.model, mlp_width=97)),
            make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)),
        )


def test_axes_without_a_rule_and_collisions_raise():
    with pytest.raises(ValueError, match="no sharding rule"):
        partition_spec(("embed", "nonsense"))
    with pytest.raises(ValueError, match="share a mesh axis"):
        partition_spec(("heads", "mlp"))
