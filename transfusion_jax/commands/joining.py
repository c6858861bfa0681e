"""Flags by which a process joins the others of a run, and cuts a model over their devices."""

import argparse

from transfusion_jax.config import Experiment, MeshConfig, ProcessesConfig
from transfusion_jax.host import use_every_core


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --num-processes and --process-id."""
    group = parser.add_argument_group(
        "several processes",
        "Under srun, in a GKE JobSet and on TPU VMs processes join by themselves.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, where the others join it"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    group.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh.data and its like, for a command that reads its config from a run."""
    group = parser.add_argument_group(
        "devices", "Along each axis of the mesh; -1: all that are left (default: as in training)."
    )
    for axis in MeshConfig().axes:
        group.add_argument(f"--mesh.{axis}", type=int, metavar="N", help=f"devices along {axis}")


def asked_mesh(arguments: argparse.Namespace) -> dict[str, int]:
    """The axes that were given."""
    given = {axis: getattr(arguments, f"mesh.{axis}") for axis in MeshConfig().axes}
    return {axis: size for axis, size in given.items() if size is not None}


def use_cores(experiment: Experiment) -> None:
    """Where a process is alone and cuts rows alone, makes a CPU device for every core; must come
    before the first use of a device."""
    from transfusion_jax.parallel.processes import joined

    if not joined() and experiment.mesh.whole_machine:
        use_every_core(experiment.data.batch_rows // experiment.train.accumulation)


def join_processes(arguments: argparse.Namespace, config: ProcessesConfig | None = None) -> None:
    """Joins the other processes, if there are any; must come before the first use of a device.

    Without a config, the default times.

    Raises:
      ValueError: they cannot be joined.
    """
    from transfusion_jax.parallel.processes import join

    join(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        config or ProcessesConfig(),
    )
