"""`evaluate`: measures a run and prints JSON."""

import argparse
import json
from pathlib import Path

from transfusion_jax.commands.bad_input import check_file, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.terminal import note
from transfusion_jax.files import write_json
from transfusion_jax.host import cache_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a trained run")
    parser.add_argument(
        "--suite", metavar="NAME", help="measure this alone (default: `evaluation` of the run)"
    )
    parser.add_argument(
        "--max-rows",
        metavar="N",
        help="held-out rows to measure likelihoods on, evenly spaced over all, at most; "
        "or `all` (default: 512)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to a file")


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.evaluation.suite import ROWS, check_names, check_suites, evaluate
    from transfusion_jax.generation.engine import load_engine

    with user_input():
        names = (arguments.suite,) if arguments.suite else ()
        check_names(names)
        check_file("--out", arguments.out)
        rows = ROWS if arguments.max_rows is None else _rows(arguments.max_rows)
        engine, step = load_engine(arguments.run_dir, note)
        names = names or engine.experiment.evaluation
        check_suites(engine, names)
    if not names:
        note(f"{arguments.run_dir} names no suite to run; --suite NAME does")
    cache_compiled(note)
    metrics = evaluate(engine, names, arguments.run_dir / "samples", note, rows)
    metrics["step"] = step
    if arguments.out:
        write_json(arguments.out, metrics)
    print(json.dumps(metrics, indent=2))
    return 0


def _rows(text: str) -> int | None:
    """The number of rows, None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--max-rows {text} must be a positive number or `all`")
    return int(text)


COMMAND = Command("measure a run, and print JSON", add_arguments, run)
