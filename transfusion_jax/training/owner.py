"""Whose a run directory is. Imports no JAX, so that it can be asked before anything starts."""

import re
from pathlib import Path
from typing import Any

from transfusion_jax.config.stored import differences, loads

CONFIG = "config.json"
LOCK = "lock"
SUMMARY = "summary.json"  # of a finished run: its numbers
# What an interrupted start can leave behind, before there is a config.
STARTED = ("tokenizer.model", "ledger.json", "autoencoder", LOCK)

# And of one that was killed, or ended by its watchdog.
LEFT = r"\.partial$|^stacks-\d+\.txt$"


def check_owner(experiment: Any, directory: Path) -> None:
    """Checks that a run of `experiment`, of whatever kind, may begin or resume in `directory`.

    Raises:
      ValueError: it may not: the directory belongs to another experiment, or is no run directory.
    """
    stored = directory / CONFIG
    if stored.exists():
        earlier = loads(stored.read_bytes(), str(stored), type(experiment))
        if changed := differences(earlier, experiment):
            raise ValueError(
                f"{directory} holds a run of another config; what differs: {'; '.join(changed)}"
            )
    elif directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, not a directory")
    elif directory.exists():
        names = {path.name for path in directory.iterdir()} - set(STARTED)
        if foreign := sorted(name for name in names if not re.search(LEFT, name)):
            raise ValueError(
                f"{directory} is not a run directory (no {CONFIG}), and holds {foreign[0]}"
            )
