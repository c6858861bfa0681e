"""The work of packed rows, counted on the host, and the peaks that it is measured against."""

import importlib.util
from types import SimpleNamespace

import jax
import packings
import pytest
from flax import nnx

from transfusion_jax.data.pipeline import Data
from transfusion_jax.model.work import batch_work, model_flops
from transfusion_jax.parallel.chips import CHIPS, peak_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.planning.rows import row_work, rows_of
from transfusion_jax.planning.topology import find_topology
from transfusion_jax.pretraining.run import step_flops
from transfusion_jax.pretraining.state import blueprint


@pytest.mark.parametrize("name", packings.PACKINGS)
def test_pairs_of_a_row_are_those_of_its_mask(name):
    packing = packings.PACKINGS[name]
    work = batch_work(packings.batch([packing]), packings.P)
    assert work.pairs == packings.mask(packing).sum()
    assert work.images == packing.count("I") and work.targets == packing.count("t")


def test_work_is_a_mean_over_rows():
    names = list(packings.PACKINGS.values())
    one_by_one = [batch_work(packings.batch([name]), packings.P) for name in names]
    together = batch_work(packings.batch(names), packings.P)
    assert together.pairs == sum(work.pairs for work in one_by_one) / len(names)
    assert together.images == sum(work.images for work in one_by_one) / len(names)


def test_training_counts_the_flops_that_a_plan_counts(experiment, tokenizer):
    """On rows of the run itself, texts and images, documents cut at the ends of rows."""
    planned = blueprint(experiment, make_mesh(experiment.mesh))
    batch = Data(experiment, tokenizer).batches()[3]
    model = nnx.merge(planned.graph, planned.abstract.parameters)
    patches = experiment.image.patches
    counted = row_work(rows_of(batch, patches, "of the run"), 0)
    ours = step_flops(planned)(batch)
    assert ours == pytest.approx(model_flops(model, experiment, counted), rel=1e-12)
    assert counted.images > 0 and counted.targets > 0
    other = step_flops(planned)(Data(experiment, tokenizer).batches()[4])
    assert ours != other  # these are the rows' own


def device(kind: str, *coords: int, slice_index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, coords=coords, slice_index=slice_index)


def test_the_peak_is_that_of_the_chips():
    v5e = [device("TPU v5 lite", i, 0, 0) for i in range(4)]
    assert peak_flops(v5e) == 4 * CHIPS["v5e"].flops
    halves = [device("TPU7x", i // 2, 0, 0) for i in range(4)]
    assert peak_flops(halves) == 2 * CHIPS["tpu7x"].flops
    slices = [device("TPU v4", 0, 0, 0, slice_index=i) for i in range(2)]
    assert peak_flops(slices) == 2 * CHIPS["v4"].flops


def test_no_peak_is_invented():
    assert peak_flops(jax.devices()) is None
    assert peak_flops([device("TPU v2", 0, 0, 0)]) is None
    assert peak_flops([device("TPU v4", 0, 0, 0), device("NVIDIA H100", 0)]) is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("kind", CHIPS)
def test_the_devices_of_every_chip_are_recognised(kind):
    topology = find_topology(f"{kind}:2x2" if CHIPS[kind].torus == 2 else f"{kind}:2x2x1")
    assert peak_flops(topology.devices) == 4 * CHIPS[kind].flops
