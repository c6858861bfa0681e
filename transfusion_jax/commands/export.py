"""`export`: a run's weights for other tools."""

import argparse

from transfusion_jax.commands.bad_input import local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.joining import add_processes, join_processes
from transfusion_jax.commands.terminal import say_leading
from transfusion_jax.errors import require
from transfusion_jax.export.formats import FORMATS
from transfusion_jax.files import atomic_directory
from transfusion_jax.host import interruptible, return_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=local, metavar="RUN_DIR", help="a trained run")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        metavar="FORMAT",
        help="; ".join(f"{name}: {known.help}" for name, known in FORMATS.items()),
    )
    parser.add_argument(
        "--out", type=local, required=True, metavar="DIR", help="a directory that is new or empty"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of the checkpoint (default: the newest)"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        metavar="WEIGHTS",
        help="average: what `generate` uses; raw: the last step's (default: average)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        metavar="DTYPE",
        help="of the weights, bfloat16 or float32 (default: float32)",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, for the model card of safetensors, as apache-2.0 (default: unknown)",
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.export.card import check_licence
    from transfusion_jax.export.trained import open_trained
    from transfusion_jax.parallel.processes import leader_does

    def write() -> None:
        form, options = FORMATS[arguments.format], {}
        if arguments.license is not None:
            require(form.card, f"--license: {arguments.format} has no model card to say it")
            check_licence(arguments.license)
            options["licence"] = arguments.license
        own = arguments.run_dir.resolve() / "checkpoints"
        require(
            own not in (arguments.out.resolve(), *arguments.out.resolve().parents),
            f"--out {arguments.out} is among the run's checkpoints",
        )
        opened, write = form.function("opened", open_trained), form.function("write")
        with interruptible(), atomic_directory(arguments.out) as out:
            trained = opened(arguments.run_dir, arguments.step, arguments.weights, say_leading)
            write(trained, out, arguments.dtype, say_leading, **options)
        say_leading(f"written to {arguments.out}")

    return_freed_memory()
    with user_input():
        join_processes(arguments)
        leader_does(write)
    return 0


COMMAND = Command("write a run's weights for other tools", add_arguments, run)
