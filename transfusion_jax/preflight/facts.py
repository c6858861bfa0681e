"""What one process knows of its host that all processes must agree on, or that a run needs."""

import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import transfusion_jax
from transfusion_jax.config import Experiment
from transfusion_jax.config.stored import dumps
from transfusion_jax.parallel.processes import gathered
from transfusion_jax.preflight.data import data_facts, initial_facts
from transfusion_jax.preflight.needs import Needs, needs_of
from transfusion_jax.preflight.run_directory import directory_problem
from transfusion_jax.training.directory import may_pass

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")
ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
"""Compared as well, where some process has them."""


@dataclass(frozen=True)
class Facts:
    """What one process knows; JSON-able."""

    process: int
    host: str
    experiment: str
    """Digest of the resolved config."""
    versions: dict[str, str]
    platform: str
    kind: str
    """Of its devices, as in "TPU v5p"."""
    devices: int
    needs: Needs
    memory: int | None
    """Bytes that a program may use on its smallest device; None where the device does not say."""
    data: dict[str, dict[str, str]]
    """By source, `digest` or `problem`."""
    directory: str | None
    """Why the run directory cannot be used; None if it can."""
    passes: bool
    """Whether that may pass by itself."""
    free: int | None
    """Bytes free where the run directory is or will be; None where its storage does not say."""
    held: int
    """Bytes of the checkpoints that are already in it."""
    clock: float
    """Seconds since 1970, read by all processes at about the same time."""

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Facts":
        return cls(**{**value, "needs": Needs(**value["needs"])})


def collect(experiment: Experiment, directory: Path) -> list[Facts]:
    """The facts of every process, in the order of processes. All must call it.

    Raises:
      ComeAgain: the run's storage fails, which may pass.
    """
    problem = directory_problem(experiment, directory)
    free, held = None, 0
    try:
        free, held = _free(directory), _held(directory / "checkpoints")
    except OSError as error:
        problem = problem or (f"cannot read {directory}: {error}", may_pass(error, directory))
    devices = jax.local_devices()
    known = {
        "process": jax.process_index(),
        "host": socket.gethostname(),
        "experiment": hashlib.sha256(dumps(experiment).encode()).hexdigest(),
        "versions": versions(),
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "needs": needs_of(experiment),
        "memory": _memory(devices),
        "data": data_facts(experiment, directory) | initial_facts(experiment, directory),
        "directory": problem and problem[0],
        "passes": problem is not None and problem[1],
        "free": free,
        "held": held,
    }
    gathered(None)  # all have come this far, so all read their clock now
    facts = Facts(**known, clock=time.time())
    return [Facts.of_json(value) for value in gathered(facts.json())]


def versions() -> dict[str, str]:
    """Versions of what a run is made of; of this package with a digest of its code."""
    root = Path(transfusion_jax.__file__).parent
    code = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        code.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    found = {
        "python": platform.python_version(),
        "transfusion_jax": f"{transfusion_jax.__version__} (code {code.hexdigest()[:8]})",
    }
    for name in (*PACKAGES, *ACCELERATORS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "not installed"
    return found


def _memory(devices: list[Any]) -> int | None:
    """The least memory of these devices; None unless all say what they have. Those of a CPU share
    that of the machine."""
    if all(device.platform == "cpu" for device in devices):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    limits = [found.get("bytes_limit") for found in stats]
    return None if None in limits else min(limits)


def _free(directory: Path) -> int:
    """Bytes free on the disk of a directory, or where it will be made."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _held(checkpoints: Path) -> int:
    """Bytes of the files under a directory; 0 where it is missing."""
    return sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
