"""What a command of the command line is made of."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transfusion_jax.commands.experiments import load_experiment


@dataclass(frozen=True)
class Command:
    """One command: its flags, and what it does."""

    help: str
    """One line."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Does the work and returns the exit code; `overrides` are the arguments that are no flags."""
    config: Callable[[], Any] | None = None
    """Makes the config whose fields `--a.b VALUE` sets, with its defaults; None: it takes none."""
    load: Callable[[str, type], Any] = lambda file, kind: load_experiment(file, kind=kind)
    """Loads a config of this kind from a Python file, for the defaults in `--help`."""
