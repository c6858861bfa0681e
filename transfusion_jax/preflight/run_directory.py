"""Whether every process can write to the run directory, and whether it is the same one."""

import contextlib
import secrets
from pathlib import Path

import jax

from transfusion_jax.config import Experiment
from transfusion_jax.files import appears
from transfusion_jax.parallel.processes import gathered, is_leader
from transfusion_jax.training.directory import PATIENCE, check_directory


def directory_problem(experiment: Experiment, directory: Path) -> str | None:
    """Why this process cannot use the run directory; None if it can. All must call it.

    The leader writes a file, all read it, and each writes one of its own. Nothing stays behind.
    """
    try:
        check_directory(experiment, directory)
        problem = None
    except ValueError as error:
        problem = str(error)
    made = _missing(directory)
    token = ""
    if is_leader() and problem is None:
        token = secrets.token_hex(8)
        problem = _write(directory, token)
    token, failed = gathered((token, problem is not None))[0]
    if not failed and problem is None:
        problem = _read(directory, token)
    gathered(None)  # all have read
    if is_leader():
        _clean(directory, token, made)
    return problem


def token_file(directory: Path, token: str) -> Path:
    """The file that the leader writes; a run directory may hold files of this suffix."""
    return directory / f"check-{token}.partial"


def _write(directory: Path, token: str) -> str | None:
    """Writes the leader's file."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        token_file(directory, token).write_text(token)
    except OSError as error:
        return f"cannot write to {directory}: {error}"
    return None


def _read(directory: Path, token: str) -> str | None:
    """Reads the leader's file, and writes and removes one of this process."""
    if not appears(token_file(directory, token), PATIENCE):
        return f"{directory.absolute()} is not the directory that process 0 writes to"
    own = token_file(directory, f"{token}-{jax.process_index()}")
    try:
        if token_file(directory, token).read_text() != token:
            return f"{directory} does not hold what process 0 wrote"
        own.write_text(token)
        own.unlink()
    except OSError as error:
        return f"cannot write to {directory}: {error}"
    return None


def _missing(directory: Path) -> list[Path]:
    """The directory and its parents that do not exist yet, the deepest first."""
    return [place for place in (directory, *directory.parents) if not place.exists()]


def _clean(directory: Path, token: str, made: list[Path]) -> None:
    """Removes the leader's file, and the directories that were made for it."""
    with contextlib.suppress(OSError):
        token_file(directory, token).unlink(missing_ok=True)
        for place in made:
            place.rmdir()
