"""`prepare`: makes a data set from pictures, captions and text."""

import argparse
from typing import Any

from transfusion_jax.commands.bad_input import local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import load_experiment, override
from transfusion_jax.commands.joining import add_processes, join_processes
from transfusion_jax.commands.terminal import say
from transfusion_jax.errors import WorkFailed
from transfusion_jax.host import cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        f"{parser.prog} INPUT... --out DIR [options] [--FIELD VALUE ...]\n"
        f"       {parser.prog} CONFIG.py --out DIR [options] [--FIELD VALUE ...]"
    )
    parser.description = (
        "Make a data set from INPUTs: folders, .jsonl, .tar, .parquet and .txt files, and "
        "tfds:NAME[:SPLIT]; or from a Python file whose config() returns a Preparation."
    )
    parser.add_argument("--out", type=local, metavar="DIR", help="the data set's directory")
    parser.add_argument(
        "--part",
        metavar="i/n",
        help="make the shards of part i of n only, such as 1/4 (default: make all)",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="make no shard: check that all are there, and make the data set of them",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode pictures; with an autoencoder, threads (default: one per core)",
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> int:
    from concurrent.futures.process import BrokenProcessPool

    from transfusion_jax.data.sources.dataset import open_dataset
    from transfusion_jax.preparation.prepare import parse_part
    from transfusion_jax.preparation.prepare import prepare as prepare_data
    from transfusion_jax.preparation.preview import description, leave_samples

    with user_input():
        preparation = _preparation(arguments.overrides)
        if arguments.out is None:
            raise ValueError("name the directory to make: --out DIR")
        part = parse_part(arguments.part) if arguments.part else None
        given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
        joins = preparation.autoencoder or any(flag is not None for flag in given)
        if joins:
            part = _joined_part(arguments, part)
        workers = cores() if arguments.workers is None else arguments.workers
        if workers < 1:
            raise ValueError(f"--workers {workers} must be at least 1")
        try:
            info = prepare_data(preparation, arguments.out, part, arguments.finish, workers, say)
        except BrokenProcessPool as error:
            raise WorkFailed(
                f"a process that decodes pictures was killed, perhaps because memory ran out "
                f"({workers=}); what is done is kept: run the same command to continue"
            ) from error
    if joins:
        _wait_for_others()
    if info is None:  # other parts have work left
        return 0
    dataset = open_dataset(arguments.out)
    leave_samples(dataset)
    say(description(dataset))
    return 0


def _joined_part(
    arguments: argparse.Namespace, part: tuple[int, int] | None
) -> tuple[int, int] | None:
    """One part for each process, where there are several."""
    from transfusion_jax.parallel.processes import numbered

    join_processes(arguments)
    number, count = numbered()
    if count == 1:
        return part
    if part is not None or arguments.finish:
        raise ValueError(f"--part and --finish are chosen by themselves for {count} processes")
    return number, count


def _wait_for_others() -> None:
    """JAX ends the processes that are still at work if one ends."""
    from transfusion_jax.parallel.processes import gathered

    gathered(None)


def _preparation(words: list[str]) -> Any:
    """The preparation of a file and its overrides, or of inputs and fields."""
    from transfusion_jax.preparation.prepare import Preparation

    if words and words[0].endswith(".py"):
        return load_experiment(words[0], words[1:], Preparation)
    return override(Preparation(), words)


def _default() -> Any:
    from transfusion_jax.preparation.prepare import Preparation

    return Preparation()


COMMAND = Command(
    "make a data set from pictures, captions and text", add_arguments, run, config=_default
)
