"""`import`: weights of others, as a directory that `train.initial` starts a run from."""

import argparse

from transfusion_jax.commands.bad_input import local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.joining import add_processes, join_processes
from transfusion_jax.commands.terminal import say_leading
from transfusion_jax.export.formats import IMPORTS
from transfusion_jax.files import atomic_directory
from transfusion_jax.host import interruptible, return_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "format",
        choices=IMPORTS,
        metavar="FORMAT",
        help="; ".join(f"{name}: {known.help}" for name, known in IMPORTS.items()),
    )
    parser.add_argument("source", type=local, metavar="SOURCE", help="the directory to read")
    parser.add_argument(
        "--out", type=local, required=True, metavar="DIR", help="a directory that is new or empty"
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.parallel.processes import leader_does

    def read() -> None:
        with interruptible(), atomic_directory(arguments.out) as out:
            IMPORTS[arguments.format].function("read")(arguments.source, out, say_leading)
        say_leading(f"written to {arguments.out}; --train.initial {arguments.out} starts from it")

    return_freed_memory()
    with user_input():
        join_processes(arguments)
        leader_does(read)
    return 0


COMMAND = Command("read weights of others, for `train.initial`", add_arguments, run)
