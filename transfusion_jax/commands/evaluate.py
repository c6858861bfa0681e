"""`evaluate`: measures a run and prints JSON."""

import argparse
import signal
from dataclasses import replace

from transfusion_jax.commands.bad_input import check_file, local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.joining import (
    add_mesh,
    add_processes,
    asked_mesh,
    join_processes,
    use_cores,
)
from transfusion_jax.commands.sampling import add_sampling, asked_sampling, check_draws
from transfusion_jax.commands.terminal import note_leading
from transfusion_jax.files import json_text, write_json
from transfusion_jax.host import cache_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=local, metavar="RUN_DIR", help="a trained run")
    parser.add_argument(
        "--suite", metavar="NAME", help="measure this alone (default: `evaluation` of the run)"
    )
    parser.add_argument(
        "--max-rows",
        metavar="N",
        help="held-out rows to measure likelihoods on, evenly spaced over all, at most; "
        "or `all` (default: 512)",
    )
    add_sampling(parser)
    parser.add_argument("--out", type=local, metavar="FILE", help="also write the JSON to a file")
    add_mesh(parser)
    add_processes(parser)


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.evaluation.suite import ROWS, check_names, check_suites, evaluate
    from transfusion_jax.generation.engine import load_engine
    from transfusion_jax.parallel.processes import is_leader, noticing_loss
    from transfusion_jax.pretraining.run import stored
    from transfusion_jax.training.watchdog import Watch

    with Watch(signal.SIGTERM) as watch, noticing_loss():
        with user_input():
            names = (arguments.suite,) if arguments.suite else ()
            check_names(names)
            check_file("--out", arguments.out)
            rows = ROWS if arguments.max_rows is None else _rows(arguments.max_rows)
            join_processes(arguments)
            if not asked_mesh(arguments):  # as in training, so that the numbers are the same
                use_cores(stored(arguments.run_dir, lambda line: None)[0])
            engine, step = load_engine(arguments.run_dir, note_leading, asked_mesh(arguments))
            asked = asked_sampling(arguments)
            engine = engine.using(**asked)
            check_draws(arguments, engine.experiment)
            names = names or engine.experiment.evaluation
            check_suites(engine, names)
        if not names:
            note_leading(f"{arguments.run_dir} names no suite to run; --suite NAME does")
        cache_compiled(note_leading)
        engine = replace(engine, moved=watch.check)
        metrics = evaluate(engine, names, arguments.run_dir / "samples", note_leading, rows)
    if not is_leader():
        return 0
    metrics["step"] = step
    if asked:
        metrics["sampler"] = asked
    try:
        if arguments.out:
            write_json(arguments.out, metrics)
    finally:  # wherever the one fails, the other has them
        print(json_text(metrics), flush=True)
    return 0


def _rows(text: str) -> int | None:
    """The number of rows, None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--max-rows {text} must be a positive number or `all`")
    return int(text)


COMMAND = Command("measure a run, and print JSON", add_arguments, run)
