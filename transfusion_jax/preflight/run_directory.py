"""Whether every process can write to the run directory, and whether it is the same one."""

import contextlib
import secrets
from pathlib import Path

import jax

from transfusion_jax.config import Experiment
from transfusion_jax.files import appears
from transfusion_jax.parallel.processes import gathered, is_leader
from transfusion_jax.training.directory import PATIENCE, check_directory, may_pass

Problem = tuple[str, bool]
"""A line, and whether it may pass: storage fails under a run that is there."""


def directory_problem(experiment: Experiment, directory: Path) -> Problem | None:
    """Why this process cannot use the run directory; None if it can. All must call it.

    The leader writes a file, all read it, and each writes one of its own. Nothing stays behind.

    Raises:
      ComeAgain: the run's storage fails, which may pass.
    """
    try:
        check_directory(experiment, directory)
        problem = None
    except ValueError as error:
        problem = str(error), False
    token, made = "", []
    if is_leader() and problem is None:
        token = secrets.token_hex(8)
        made, problem = _write(directory, token)
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


def _write(directory: Path, token: str) -> tuple[list[Path], Problem | None]:
    """Writes the leader's file. Returns the directories made for it, the deepest first."""
    made = []
    try:
        made = [place for place in (directory, *directory.parents) if not place.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        token_file(directory, token).write_text(token)
    except OSError as error:
        return made, _unwritable(directory, error)
    return made, None


def _read(directory: Path, token: str) -> Problem | None:
    """Reads the leader's file, and writes and removes one of this process."""
    own = token_file(directory, f"{token}-{jax.process_index()}")
    try:
        if not appears(token_file(directory, token), PATIENCE):
            return f"{directory.absolute()} is not the directory that process 0 writes to", False
        if token_file(directory, token).read_text() != token:
            return f"{directory} does not hold what process 0 wrote", False
        own.write_text(token)
        own.unlink()
    except OSError as error:
        return _unwritable(directory, error)
    return None


def _unwritable(directory: Path, error: OSError) -> Problem:
    return f"cannot write to {directory}: {error}", may_pass(error, directory)


def _clean(directory: Path, token: str, made: list[Path]) -> None:
    """Removes the leader's file, and the directories that were made for it."""
    with contextlib.suppress(OSError):
        token_file(directory, token).unlink(missing_ok=True)
        for place in made:
            place.rmdir()
