"""`generate`: continues prompts with text and images."""

import argparse
import signal
from dataclasses import replace
from typing import Any

from transfusion_jax.commands.bad_input import check_directory, local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.joining import (
    add_mesh,
    add_processes,
    asked_mesh,
    join_processes,
)
from transfusion_jax.commands.sampling import add_sampling, asked_sampling, check_draws
from transfusion_jax.commands.terminal import harmless, note_leading, say, say_leading
from transfusion_jax.host import cache_compiled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=local, metavar="RUN_DIR", help="a trained run")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the text to continue; given several times, each is a request of its own",
    )
    parser.add_argument(
        "--image",
        action="append",
        type=local,
        default=[],
        metavar="FILE",
        help="an image that comes before the prompt; given several times, all do, in this order",
    )
    parser.add_argument(
        "--draw",
        action="store_true",
        help="begin with an image, instead of leaving that to the model",
    )
    parser.add_argument(
        "--num",
        type=int,
        default=1,
        metavar="N",
        help="how many continuations of each (default: 1)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="K", help="of all random draws (default: 0)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of text; 0 is greedy (default: the run's sampler.temperature)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="positions that a continuation may take, those of images included "
        "(default: the run's sampler.max_tokens)",
    )
    parser.add_argument(
        "--out",
        type=local,
        required=True,
        metavar="DIR",
        help="the directory to write 0.png, ... and outputs.jsonl to",
    )
    add_mesh(parser)
    add_processes(parser)


def run(arguments: argparse.Namespace) -> int:
    from transfusion_jax.generation.outputs import write_outputs
    from transfusion_jax.parallel.processes import is_leader, noticing_loss
    from transfusion_jax.training.watchdog import Watch

    with Watch(signal.SIGTERM) as watch, noticing_loss():
        with user_input():
            engine, requests = _requests(arguments)
        cache_compiled(say_leading)
        engine = replace(engine, moved=watch.check)
        requests = [request for request in requests for _ in range(arguments.num)]
        answers = engine.generate(requests, arguments.seed, arguments.draw)
    if not is_leader():
        return 0
    prompts = [spans[-1] if isinstance(spans[-1], str) else "" for spans in requests]
    print(harmless(write_outputs(arguments.out, prompts, answers)), end="")
    say(f"written to {arguments.out}")
    return 0


def _requests(arguments: argparse.Namespace) -> tuple[Any, list[tuple]]:
    """The engine with the sampler settings asked for, and the checked requests."""
    from transfusion_jax.generation.engine import load_engine

    prompts = arguments.prompt or [""]
    if not all(prompt.strip() or arguments.image for prompt in prompts):
        raise ValueError("the prompt is empty: give --prompt TEXT, or --image FILE, or both")
    if arguments.num < 1:
        raise ValueError(f"--num {arguments.num} must be at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed {arguments.seed} must be in 0..2^32 - 1")
    check_directory("--out", arguments.out)
    join_processes(arguments)
    engine, _ = load_engine(arguments.run_dir, say_leading, asked_mesh(arguments))
    engine = engine.using(**asked_sampling(arguments))
    check_draws(arguments, engine.experiment)
    engine.require_pictures()
    images = [engine.read(file) for file in arguments.image]
    requests = [(*images, *[prompt] * bool(prompt.strip())) for prompt in prompts]
    longest, trained = engine.check(requests), engine.experiment.data.row_length
    if longest > trained:
        note_leading(
            f"note: the answer may reach position {longest}, and none beyond {trained} was trained "
            f"(data.row_length); --max-tokens bounds it"
        )
    return engine, requests


COMMAND = Command("continue prompts with text and images", add_arguments, run)
