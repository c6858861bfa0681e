"""Settings of the host process."""

import io
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from transfusion_jax.host import bar_intervals, cache_compiled, core_quota, process_start

CACHED = """
import sys

import jax
import jax.numpy as jnp

from transfusion_jax import host
from transfusion_jax.host import cache_compiled

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
if "accelerator" in sys.argv:
    jax.default_backend = lambda: "gpu"  # what compiles here is a CPU nevertheless
if "processes" in sys.argv:
    jax.process_count = lambda: 2
if "processor" in sys.argv:
    host._kind_of_processor = lambda: "another"
directory = cache_compiled(print)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(directory, found.count("/jax/compilation_cache/cache_hits"))
"""


def start(home: Path, *arguments: str, **variables: str) -> str:
    environment = {
        "XDG_CACHE_HOME": str(home),
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", CACHED, *arguments]
    found = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()[-1]


@pytest.mark.parametrize("platform", ["accelerator", "cpu"])
def test_a_second_start_compiles_nothing_that_the_first_compiled(tmp_path, platform):
    where, found = start(tmp_path, platform).split()
    assert Path(where).is_relative_to(tmp_path / "transfusion_jax" / "xla") and found == "0"
    again, found = start(tmp_path, platform).split()
    assert again == where and int(found) > 0


def test_programs_for_other_processors_are_not_run(tmp_path):
    where, _ = start(tmp_path).split()
    other, found = start(tmp_path, "processor").split()
    assert other != where and found == "0"


def test_it_is_off_for_processes_on_cpus_and_where_a_user_says_so(tmp_path):
    off = start(tmp_path, "accelerator", JAX_ENABLE_COMPILATION_CACHE="false")
    assert off == "None 0" == start(tmp_path, "processes")
    assert not (tmp_path / "transfusion_jax").exists()


def test_a_directory_that_cannot_be_made_is_said_and_nothing_is_kept(tmp_path, monkeypatch):
    said = []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    default = SimpleNamespace(jax_enable_compilation_cache=True, jax_compilation_cache_dir=None)
    monkeypatch.setattr("jax.config", default)
    assert cache_compiled(said.append) is None
    assert "compiled programs are not kept" in said[0] and "Not a directory" in said[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_log_file_is_rarely_written(monkeypatch, tmp_path, terminal):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    shown = io.StringIO()
    clock = itertools.count()  # a second for each look at it
    with tqdm(file=shown, disable=False, **bar_intervals()) as bar:
        bar._time = lambda: float(next(clock))
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(600):
            bar.update()
    assert shown.getvalue().count("\r") in (range(300, 700) if terminal else range(4, 25))


def test_the_start_of_this_process_is_known():
    stat = subprocess.run(
        ["ps", "-o", "etimes=", "-p", str(os.getpid())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(time.time() - process_start() - int(stat.stdout)) < 2


@pytest.mark.parametrize(
    ("said", "cores"),
    [("max 100000", math.inf), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1),
     (None, math.inf)],
)  # fmt: skip
def test_a_container_has_the_cores_of_its_quota(tmp_path, said, cores):
    if said:
        (tmp_path / "cpu.max").write_text(said + "\n")
    assert core_quota(tmp_path / "cpu.max") == cores


CORES = """
import sys
from transfusion_jax import host
host.cores = lambda: 4
host.use_every_core(int(sys.argv[1]))
import jax
print(jax.device_count())
host.use_every_core(3)  # too late, and no error
"""


@pytest.mark.parametrize(
    ("rows", "flags", "devices"),
    [
        ("8", "", 4),
        ("6", "", 3),
        ("5", "", 1),
        ("8", "--xla_force_host_platform_device_count=2", 2),
    ],
)
def test_the_cpu_has_a_device_for_every_core_that_the_rows_allow(rows, flags, devices):
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CORES, rows]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert said.stdout.split() == [str(devices)], said.stderr
