"""A run directory, of any kind of run: checked, opened, and the progress in its checkpoints.

config.json     the resolved experiment; written last, so a directory with one is complete
checkpoints/    Orbax: the state, the seconds of training, the digests of the data
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfusion_jax.config.stored import dumps
from transfusion_jax.errors import ComeAgain, require
from transfusion_jax.files import appears, write_atomic
from transfusion_jax.parallel.processes import gathered, is_leader
from transfusion_jax.training.checkpoint import Checkpoints, Report
from transfusion_jax.training.lock import InUse, Lock
from transfusion_jax.training.owner import CONFIG, LOCK, SUMMARY, check_owner
from transfusion_jax.training.storage_errors import STORAGE

Fingerprints = tuple[tuple[str, str], ...]
"""Name and digest of each source of data."""
PATIENCE = 70.0
"""Seconds until what another host wrote must be seen."""


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory."""

    path: Path
    checkpoints: Checkpoints
    fingerprints: Fingerprints
    state: Any | None
    """The restored state; None where there is no checkpoint yet."""
    train_seconds: float
    """Spent on the steps that the state holds."""
    lock: Lock | None
    """Of the process that leads."""

    @property
    def start(self) -> int:
        """Steps taken."""
        return 0 if self.state is None else int(self.state.step)

    def kept(self) -> contextlib.AbstractContextManager[None]:
        """No other run uses the directory until the block ends, though this is closed before."""
        return self.lock.kept() if self.lock else contextlib.nullcontext()

    def close(self) -> None:
        """Waits for the checkpoint in progress, and lets another run use the directory."""
        self.checkpoints.close()
        if self.lock:
            self.lock.release()

    def save(self, state: Any, train_seconds: float) -> None:
        """Starts writing a checkpoint, in the background."""
        digests = [digest for _, digest in self.fingerprints]
        self.checkpoints.save(state, {"train_seconds": train_seconds, "data": digests})


def check_directory(experiment: Any, directory: Path) -> None:
    """Checks that a run of `experiment`, of whatever kind, may begin or resume in `directory`.

    One process looks, before any writes, and all hear what it finds.

    Raises:
      ValueError: it may not: the directory belongs to another experiment, or is no run directory.
      ComeAgain: the run's storage fails, which may pass.
    """
    problem = None
    if is_leader():
        try:
            check_owner(experiment, directory)
        except (OSError, ValueError) as error:
            problem = _problem(error, directory)
    _raise_together(problem)


def may_pass(error: OSError, directory: Path) -> bool:
    """Whether an error is one of storage that fails under a run that is there already. Storage that
    does not even say what is there counts as that of a run."""
    if error.errno not in STORAGE:
        return False
    try:
        (directory / CONFIG).stat()
    except OSError as found:
        return found.errno in STORAGE
    return True


def _problem(error: OSError | ValueError, directory: Path) -> tuple[str, bool]:
    """An error of opening a directory in a line, and whether it may pass: under a run that is there
    already, storage that fails, or a lock of another machine, which may be gone."""
    if isinstance(error, OSError) and may_pass(error, directory):
        line = f"cannot open the run in {directory} ({error.strerror})"
        return f"{line}; the same command tries again", True
    if isinstance(error, InUse) and error.elsewhere and os.path.exists(directory / CONFIG):
        return f"{error}; if that host is gone, remove {directory / LOCK}", True
    return str(error), False


def _raise_together(problem: tuple[str, bool] | None) -> None:
    """Raises in all processes what the one that leads has found, if anything."""
    if found := gathered(problem)[0]:
        line, passes = found
        raise ComeAgain(line) if passes else ValueError(line)


def open_directory(
    path: Path,
    experiment: Any,
    abstract: Any,
    fingerprints: Fingerprints,
    fill: Callable[[Path], None],
    report: Report,
) -> RunDirectory:
    """Opens the directory of a new run, or of one to resume, once `check_directory` has passed it.

    `fill(path)` writes what a new run's directory holds beside its config. The newest readable
    checkpoint is restored as `abstract`. A config that differs from the stored one, in fields that
    may change, takes its place.

    Raises:
      ValueError: the data under the run has changed since the checkpoint; processes read different
        data, or do not share the directory; or another run is using it, or has used it since it
        passed.
      CheckpointError: the run has checkpoints, and none can be read.
      ComeAgain: the run's storage fails, or another machine holds the run, which may pass.
    """
    _check_same(fingerprints)
    lock, problem = _prepared(path, experiment, fill) if is_leader() else (None, None)
    _raise_together(problem)
    try:
        return _opened(path, experiment, abstract, fingerprints, report, lock)
    except BaseException:
        if lock:
            lock.release()
        raise


def _opened(
    path: Path,
    experiment: Any,
    abstract: Any,
    fingerprints: Fingerprints,
    report: Report,
    lock: Lock | None,
) -> RunDirectory:
    config, text = path / CONFIG, dumps(experiment)
    seen = gathered(appears(config, PATIENCE))
    require(
        all(seen),
        f"process {seen.index(False) if False in seen else 0} does not see {config}: all processes "
        "must share the run directory",
    )
    settings = experiment.train
    checkpoints = Checkpoints(
        path / "checkpoints", settings.keep_checkpoints, report, settings.failed_save
    )
    state = None
    train_seconds = 0.0
    if restored := checkpoints.restore(abstract):
        state, progress = restored
        _check_data(path, fingerprints, progress["data"])
        train_seconds = float(progress["train_seconds"])
    problem = None
    if is_leader():
        try:
            if config.read_text() != text:
                # Its numbers are of the other config: they would pass for this one's after a kill.
                (path / SUMMARY).unlink(missing_ok=True)
                write_atomic(config, text.encode())
        except OSError as error:
            problem = _problem(error, path)
    _raise_together(problem)
    return RunDirectory(path, checkpoints, fingerprints, state, train_seconds, lock)


def _check_same(fingerprints: Fingerprints) -> None:
    """Raises ValueError unless all processes read the same data."""
    own, *others = gathered([list(pair) for pair in fingerprints])
    for process, other in enumerate(others, 1):
        for (name, digest), (_, found) in zip(own, other, strict=True):
            require(digest == found, f"process {process} reads other data than process 0: {name}")


def _prepared(
    path: Path, experiment: Any, fill: Callable[[Path], None]
) -> tuple[Lock | None, tuple[str, bool] | None]:
    """A new run's directory filled, or an existing one as it is; its lock, or why there is none."""
    lock = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path / LOCK)
        check_owner(experiment, path)  # again: another run may have had it since
    except (OSError, ValueError) as error:
        if lock:
            lock.release()
        return None, _problem(error, path)
    if not (path / CONFIG).exists():
        fill(path)
        write_atomic(path / CONFIG, dumps(experiment).encode())
    return lock, None


def _check_data(path: Path, fingerprints: Fingerprints, stored: list[str] | str) -> None:
    """Raises ValueError if the data is not that of the checkpoint."""
    stored = [stored] if isinstance(stored, str) else stored  # autoencoders once stored a string
    pairs = zip(fingerprints, stored, strict=True)
    if changed := [name for (name, digest), old in pairs if digest != old]:
        raise ValueError(
            f"the data under {path} has changed since it was trained: {', '.join(changed)}"
        )


def copy_directory(source: Path, target: Path) -> None:
    """Copies a directory atomically, in place of what `target` was."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)
