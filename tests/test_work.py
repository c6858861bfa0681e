"""The work of packed rows, counted on the host, and the peaks that it is measured against."""

import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import packings
import pytest

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
    counted = row_work(rows_of(batch, experiment.image.patches, "of the run"), 0)
    ours = step_flops(planned)(batch)
    expected = model_flops(planned.multiplications, experiment, counted)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert counted.images > 0 and counted.targets > 0
    other = step_flops(planned)(Data(experiment, tokenizer).batches()[4])
    assert ours != other  # these are the rows' own


def test_flops_are_those_counted_by_hand(experiment, tokenizer):
    """Matrix by matrix, position by position, pair by pair, and three times the forward pass."""
    batch = Data(experiment, tokenizer).batches()[3]
    D, H, F, V = 64, 16, 96, 512  # of conftest.py: 4 heads, 2 key-value heads, 2 layers
    block = D * 4 * H + 2 * D * 2 * H + 4 * H * D + 3 * D * F
    rows, length = batch.tokens_BL.shape
    pairs = 0
    for row in range(rows):
        end = np.arange(length) + 1
        for start in batch.image_start_BM[row]:
            end[start : start + 16] = start + 16  # patches of an image see all of it
        for i in np.flatnonzero(batch.segment_BL[row]):
            document = np.flatnonzero(batch.segment_BL[row] == batch.segment_BL[row][i])
            pairs += np.sum(document < end[i])
    images = np.sum(batch.image_start_BM < length)
    forward = 2 * 2 * block * rows * length + 2 * D * V * np.sum(batch.text_weight_BL > 0)
    forward += 2 * 2 * 2 * 4 * H * pairs  # layers, products, operations
    forward += 2 * images * 16 * 2 * 4 * D  # patches: four values in, four out
    forward += 2 * images * (256 * D + D * D + D * 4)  # timestep: 256 waves, two layers, to a patch
    counted = step_flops(blueprint(experiment, make_mesh(experiment.mesh)))(batch)
    assert counted == 3 * forward


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
