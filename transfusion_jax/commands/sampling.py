"""Flags of the commands that draw: they override fields of the run's sampler."""

import argparse

from transfusion_jax.config import Experiment
from transfusion_jax.errors import require

FIELDS = ("guidance", "steps", "candidates", "temperature", "max_tokens")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="classifier-free guidance of images; 1 is none (default: the run's sampler.guidance)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="S",
        help="denoising steps of an image (default: the run's sampler.steps)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="images drawn for every one that is kept, the one that the model itself reads as its "
        "text (default: the run's sampler.candidates)",
    )


def asked_sampling(arguments: argparse.Namespace) -> dict:
    """Of `sampler`, the fields given."""
    asked = {name: getattr(arguments, name, None) for name in FIELDS}
    return {name: value for name, value in asked.items() if value is not None}


def check_draws(arguments: argparse.Namespace, experiment: Experiment) -> None:
    """Raises ValueError if a flag of images is given for a model of text alone."""
    values = {name: getattr(arguments, name, None) for name in ("draw", *FIELDS[:3])}
    given = [name for name, value in values.items() if value is not None and value is not False]
    require(
        not given or experiment.model.images != "none",
        f"--{', --'.join(given)}: the model of {arguments.run_dir} is of text alone",
    )
