"""Plans kept on disk, so that a search that was stopped goes on where it was.

A plan is a function of the experiment, the topology, the rows that its work is counted on, this
package's code, and the versions of what compiles it. A plan is filed under a hash of all of these.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax

import transfusion_jax
from transfusion_jax.config import Experiment
from transfusion_jax.config.stored import dumps, loads
from transfusion_jax.files import write_json
from transfusion_jax.planning.plan import Costs, Memory, Plan, make_plan
from transfusion_jax.planning.rows import Rows
from transfusion_jax.planning.topology import Topology

COMPILERS = ("jax", "jaxlib", "libtpu", "flax", "optax")


def kept_plan(
    experiment: Experiment,
    topology: Topology,
    rows: Rows,
    directory: Path,
    report: Callable[[str], None],
) -> Plan:
    """`make_plan`, unless `directory` has this plan; what is made is put there.

    A file that cannot be read or written is reported, and the plan is made.

    Raises:
      ValueError: as `make_plan`.
    """
    path = directory / f"{_key(experiment, topology, rows)}.json"
    if path.exists():
        try:
            plan = _load(path, topology)
            report(f"as planned before: {path}")
            return plan
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"{path} is not a plan, and is made again: {error}")
    plan = make_plan(experiment, topology, rows)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, _stored(plan))
    except OSError as error:
        report(f"the plan is not kept: {error}")
    return plan


def _stored(plan: Plan) -> dict:
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    values["experiment"] = json.loads(dumps(plan.experiment))
    values["memory"] = dataclasses.asdict(plan.memory)
    values["costs"] = plan.costs and dataclasses.asdict(plan.costs)
    del values["topology"]
    return values


def _load(path: Path, topology: Topology) -> Plan:
    values = json.loads(path.read_text())
    values["experiment"] = loads(json.dumps(values["experiment"]), str(path))
    values["memory"] = Memory(**values["memory"])
    values["costs"] = values["costs"] and Costs(**values["costs"])
    return Plan(topology=topology, **values)


def _key(experiment: Experiment, topology: Topology, rows: Rows) -> str:
    digest = hashlib.sha256()
    counted = [rows.images, rows.targets, rows.origin]
    versions = [_version(name) for name in COMPILERS]
    level = jax.config.jax_optimization_level
    settings = [topology.name, topology.slices, counted, versions, level, _code()]
    digest.update(json.dumps(settings).encode())
    digest.update(dumps(experiment).encode())
    for array in jax.tree.leaves(rows.intervals):
        digest.update(bytes(memoryview(jax.device_get(array)).cast("B")))
    return digest.hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _code() -> str:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    root = Path(transfusion_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
