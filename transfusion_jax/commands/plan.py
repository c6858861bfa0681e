"""`plan`: compiles the training step for TPUs you do not have, and says what it would take."""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

from transfusion_jax.commands.bad_input import check_file, local, user_input
from transfusion_jax.commands.command import Command
from transfusion_jax.commands.experiments import add_experiment, asked_experiment
from transfusion_jax.commands.terminal import say
from transfusion_jax.config import Experiment
from transfusion_jax.files import write_json
from transfusion_jax.host import cache_directory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="the TPU slice, such as v5p:4x4x4 (default: mesh.topology of the experiment)",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="n",
        help="slices, joined by the data centre's network (default: 1)",
    )
    parser.add_argument("--json", type=local, metavar="FILE", help="also write the plan as JSON")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try remat policies, numbers of microbatches and meshes, and rank them",
    )


def run(arguments: argparse.Namespace) -> int:
    import jax

    from transfusion_jax.planning.cache import kept_plan
    from transfusion_jax.planning.describe import page
    from transfusion_jax.planning.rows import sample_rows
    from transfusion_jax.planning.topology import find_topology

    jax.config.update("jax_platforms", "cpu")  # compiles for TPU, computes next to nothing
    with user_input():
        experiment = asked_experiment(arguments)
        name = arguments.topology or experiment.mesh.topology
        if not name:
            raise ValueError(
                "name a topology: --topology v5p:4x4x4, or mesh.topology in the experiment"
            )
        check_file("--json", arguments.json)
        topology = find_topology(name, arguments.slices)
        planner = functools.partial(
            kept_plan,
            rows=sample_rows(experiment),
            directory=cache_directory("plans"),
            report=say,
        )
        say(f"compiling the training step of {experiment.name} for {name}, minutes if it is new")
        planned = planner(experiment, topology)
    say(page(planned))
    if experiment.model.patch_encoder == "unet" and not os.environ.get("JAX_OPTIMIZATION_LEVEL"):
        say("  a U-Net, compiled with XLA's least effort: in training its memory may differ")
    answer = planned.json()
    if arguments.json:
        write_json(arguments.json, answer)
    if arguments.search:
        planned, answer = _search(planner, planned)
    elif not planned.fits:
        answer["remedies"] = _remedies(planner, planned)
    if arguments.json:
        write_json(arguments.json, answer)
    return 0 if planned.fits else 1


def _search(planner: Callable[..., Any], planned: Any) -> tuple[Any, dict]:
    """The best plan, and it as JSON with all others; prints each as it is found."""
    from transfusion_jax.planning.describe import ranked, table
    from transfusion_jax.planning.search import search

    plans = [planned]
    for found in search(planner, planned):
        plans.append(found)
        say(table([found]).splitlines()[-1])
    say("\nbest first\n" + table(plans))
    best = ranked(plans)[0]
    return best, {**best.json(), "search": [found.json() for found in ranked(plans)]}


def _remedies(planner: Callable[..., Any], planned: Any) -> list[dict]:
    """The changes that make the step fit, as JSON; prints all that are tried."""
    from transfusion_jax.planning.describe import size
    from transfusion_jax.planning.search import remedies

    say("trying what would fit")
    fitting = []
    for change, found in remedies(planner, planned):
        if found.fits:
            seconds = f"{found.step_seconds:.4g} s a step at best"
            say(f"  {change}: fits in {size(found.memory.peak)}, {seconds}")
            fitting.append({"change": change, **found.json()})
        else:
            say(f"  {change}: does not fit, {size(found.memory.peak)}")
    if not fitting:
        say("  nothing found")
    return fitting


COMMAND = Command(
    "compile the training step for TPUs you do not have: memory, FLOPs, collectives, time",
    add_arguments,
    run,
    config=lambda: Experiment(name="NAME"),
)
