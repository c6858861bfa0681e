"""A run directory, of whatever kind of run: whether a run may begin or go on in it."""

import os
import shutil
from pathlib import Path
from typing import Any

from transfusion_jax.config.stored import differences, loads


def check_directory(experiment: Any, directory: Path) -> None:
    """Raises ValueError unless a run of `experiment`, of whatever kind, may begin or go on in `directory`."""
    stored = directory / "config.json"
    if stored.exists():
        earlier = loads(stored.read_text(), str(stored), type(experiment))
        if changed := differences(earlier, experiment):
            raise ValueError(
                f"{directory} holds a run of another config; what differs: {'; '.join(changed)}"
            )
    elif directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, not a directory")
    elif directory.exists():
        foreign = {p.name for p in directory.iterdir()} - {
            "tokenizer.model",
            "ledger.json",
            "autoencoder",
        }
        if foreign := sorted(name for name in foreign if not name.endswith(".partial")):
            raise ValueError(
                f"{directory} is not a run directory (no config.json), and holds {foreign[0]}"
            )


def copy_directory(source: Path, target: Path) -> None:
    """Copies a directory whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)
