"""Every benchmark runs; what it measures is not looked at."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = {
    "attention_blocks": "--rows 1 --length 512 --blocks 128 --heads 1 --kv-heads 1",
    "attention_parity": "",
    "export": "--size 0.16B",
    "gpu": "--try --only 0.16B/ours-minimal",
    "kernel_schedule": "--rows 1 --blocks 128x128 --head-dim 64",
    "maxtext_peer": "ours --layers 1",
    "peers": "--try --only 256/ours 256/torch-eager",
    "prepare": "--pictures 4 --copies 2 --width 64 --size 16 --rounds 1",
    "processes": "--width 64 --layers 1 --length 300 --rows 2 --steps 1 --rounds 1",
    "read_rows": "--rows 16 --pairs 64",
    "scale": "--documents 40000 --starts 1",
    "torch_peer": "--width 64 --layers 1 --length 300 --batch 1 --steps 1 --no-compile",
    "transfusion_pytorch_peer": "--width 64 --layers 1 --length 300 --batch 1 --steps 1",
    "train_step": "--width 64 --layers 1 --length 300 --batch 1 --steps 1",
    "week": "--faults 2 --steps 40",
}
SLOW = {"export", "gpu", "kernel_schedule", "maxtext_peer", "peers", "processes", "week"}
NEEDS = {
    "attention_blocks": "libtpu",
    "attention_parity": "tokamax",
    "kernel_schedule": "libtpu",
    "maxtext_peer": "libtpu",
    "peers": "torch",
    "torch_peer": "torch",
    "transfusion_pytorch_peer": "transfusion_pytorch",
}


def test_all_benchmarks_are_run_here():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ARGUMENTS],
)
def test_a_benchmark_runs(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    command = [sys.executable, BENCHMARKS / f"{name}.py", *ARGUMENTS[name].split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_table_of_a_gpu_has_ratios_and_failures():
    gpu = run_path(str(BENCHMARKS / "gpu.py"))
    ours = {"tokens_per_second": 300.0, "utilisation": 0.5, "memory_gib": 20.0, "parameters": 7e6}
    torch = {"tokens_per_second": 200.0, "memory_gib": 10.0, "parameters": 8e6}
    found = {"parity": {"right": False}, "S/ours": ours, "S/torch": torch, "T/ours": None}
    lines = [line.split() for line in gpu["table"](found).splitlines()[1:]]
    assert lines == [
        ["parity", "NOT", "right"],
        ["S/ours", "300", "50.0%", "20.0", "7.0", "1.50"],
        ["S/torch", "200", "10.0", "8.0", "1.00"],
        ["T/ours", "failed"],
    ]


BUNDLES = """\
= control target key start
LB: loop body
     0   :  { %s1 = sld [smem:[#allocation1]] }
   0x1 LB: > { %1 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %2 = vmatmul.msk.bf16.gmra.mxu1 %v2 }
   0x2   : > { %3 = vmatmul.f32.gmra.mxu0 %v1  ;;  %v4 = vpop.f32.mrf.mxu1 }
   0x3 PF: > { %v5 = vadd.f32 %v4, %v4 }
"""
UTILISATION = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
2 0 0 0 0 0 0 0 0 0
1 0 0 1 0 0 0 0 0 0
0 0 1 0 0 0 0 0 0 0
"""


NEWER = re.sub(r"(?m)^(\d)", r"\1 0", UTILISATION.replace("MXU", "MATMUL, MATPUSH"))
NEWER = NEWER.replace("    4     3     4", "    4     4     3     4")


@pytest.mark.parametrize("utilisation", [UTILISATION, NEWER], ids=["0.0.50", "0.0.52"])
def test_the_schedule_of_a_kernel_is_read(monkeypatch, utilisation):
    """The second product on a unit waits for the 16 rows of the first, and then takes 8."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    schedule = importlib.import_module("kernel_schedule")
    before, body, rest = schedule.parts(BUNDLES, utilisation, schedule.CORES["v5e"])
    assert [(x.mark, x.bundles, x.cycles, x.busy) for x in (before, body, rest)] == [
        ("", 1, 1, 0.0),
        ("LB", 2, 24, 10.0),
        ("PF", 1, 1, 0.0),
    ]
    products = body.full["MXU" if utilisation == UTILISATION else "MATMUL"]
    assert (products, body.full["VPOP"], rest.full["VALU"]) == (0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    ("steps", "logged", "message"),
    [
        ([1, 2, 3, 4, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], None),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6], "the log must have steps 1 to 6"),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 3, 4, 5, 6], "the log must have steps 1 to 6"),
        ([1, 2, 3, 4, 3.001, 4, 5, 6], [1, 2, 3, 4, 5, 6], "step 3: image_loss 3.001, not 3"),
    ],
)
def test_a_week_that_lost_something_is_seen(tmp_path, steps, logged, message):
    """Losses are the step itself, or a little off."""
    week = run_path(str(BENCHMARKS / "week.py"))
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in logged))

    def run(losses):
        names = ("loss", "text_loss", "image_loss")
        rows = [{"step": int(x), **dict.fromkeys(names, x)} for x in losses]
        return SimpleNamespace(directory=tmp_path, rows=rows, exit_code=0, faults=[])

    found = week["problems"](run(steps), run(range(1, 7)), 6)
    assert bool(found) == bool(message) and (message or "") in "\n".join(found)
