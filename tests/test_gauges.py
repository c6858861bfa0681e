"""Rates of steps, by numbers that are set by hand."""

from types import SimpleNamespace

import jax
import pytest

from transfusion_jax.parallel.chips import CHIPS
from transfusion_jax.training import gauges
from transfusion_jax.training.gauges import Gauges, peak_memory

FEED = SimpleNamespace(flops=lambda batch: batch)
CHIP = [SimpleNamespace(device_kind="TPU v5p", coords=(i, 0, 0)) for i in range(2)]


def test_utilisation_is_the_flops_of_finished_steps_over_time_and_peak():
    seen = Gauges(FEED, CHIP)
    for step, flops in ((1, 3e14), (2, 4e14), (3, 5e14)):
        seen.dispatched(step, flops)
        seen.finished(step - 1)
    row = seen.row(2, 4.0)  # the third is still running
    assert row["step_seconds"] == 2.0 and row["model_flops_per_second"] == 7e14 / 4
    assert row["model_flops_per_step"] == 7e14 / 2
    expected = 7e14 / 4 / (2 * CHIPS["v5p"].flops)
    assert row["model_flop_utilisation"] == pytest.approx(expected, abs=1e-5)
    seen.finished(3)
    assert seen.row(1, 1.0)["model_flops_per_second"] == 5e14


def test_what_is_not_known_is_left_out():
    row = Gauges(SimpleNamespace(flops=None), CHIP).row(1, 1.0)
    assert set(row) == {"time", "step_seconds"}
    seen = Gauges(FEED, jax.devices())
    seen.dispatched(1, 1e9)
    seen.finished(1)
    flops = {"model_flops_per_step", "model_flops_per_second"}
    assert set(seen.row(1, 1.0)) == {"time", "step_seconds"} | flops


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert peak_memory() is None  # CPUs do not tell
    stats = [{"peak_bytes_in_use": 3 * 2**30}, {"peak_bytes_in_use": 5 * 2**30}, None]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(gauges.jax, "local_devices", lambda: devices)
    assert Gauges(FEED, CHIP).row(1, 1.0)["device_memory_gib"] == 5
