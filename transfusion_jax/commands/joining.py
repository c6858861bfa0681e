"""Flags by which a process joins the others of a run."""

import argparse

from transfusion_jax.config import ProcessesConfig


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


def join_processes(arguments: argparse.Namespace, config: ProcessesConfig) -> None:
    """Joins the other processes, if there are any; must come before the first use of a device.

    Raises:
      ValueError: they cannot be joined.
    """
    from transfusion_jax.parallel.processes import join

    join(arguments.coordinator, arguments.num_processes, arguments.process_id, config)
