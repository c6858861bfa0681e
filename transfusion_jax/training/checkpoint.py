"""Checkpoints: all that training needs to resume, saved together by Orbax, in the background.

Each holds the fields of a state (parameters, average, optimizer, counters) and the run's progress.
Each field is saved with a checksum, computed on the devices: the sum, modulo 2^32, of the bit
patterns of all elements. The sum does not depend on order or sharding, so a checkpoint can be
verified on any mesh, and damage that still decodes is found.
"""

import contextlib
import dataclasses
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax import Array

from transfusion_jax.errors import ComeAgain, WorkFailed
from transfusion_jax.parallel.processes import gathered, is_leader
from transfusion_jax.training.state import AnyState
from transfusion_jax.training.storage_errors import (
    as_line,
    failure,
    kind_of,
    out_of_memory,
)

Report = Callable[[str], None]
ROOM = 1.1
SMALL_FILES = 1 << 20  # bytes; a save takes this and ROOM times the bytes of the state
RETRIES = (1.0, 5.0)  # seconds before a checkpoint that could not be read is read again


class CheckpointError(WorkFailed):
    """No checkpoint of a run can be read, or one that must be could not be written."""


class CheckpointUnreadable(ComeAgain):
    """A checkpoint could not be read now; nothing says that it is damaged."""


@jax.jit
def checksum(tree: Any) -> Array:
    """Order-independent checksum of the bits of all arrays of a tree (uint32, modulo 2^32)."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    sums = [
        jnp.sum(jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]).astype(jnp.uint32))
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sum(jnp.stack(sums))


class Checkpoints:
    """The checkpoints of one run directory; the newest `keep` stay.

    With several processes, all of them call every method together, and what one of them finds holds
    for all.
    """

    def __init__(self, directory: Path, keep: int, report: Report, failed_save: str = "continue"):
        quieten_orbax()
        self._directory = directory
        self._keep = keep
        self._failed_save = failed_save
        self._report = report
        directory.mkdir(parents=True, exist_ok=True)
        self._manager = self._open()
        self._saving: tuple[int, ocp.AsyncResponse | Exception] | None = None
        self._saved = True  # whether the last save succeeded

    def _open(self) -> ocp.training.Checkpointer:
        """Orbax's own manager; opening it removes what an interrupted write left behind."""
        policy = ocp.training.preservation_policies.LatestN(self._keep)
        return ocp.training.Checkpointer(
            self._directory.absolute(), preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(self, state: AnyState, progress: dict[str, Any]) -> None:
        """Starts writing in the background. A write that fails is reported, at the latest when
        something waits for it.

        Raises:
          CheckpointError: the write before failed, or this one cannot begin, and `failed_save` is
        "stop".
        """
        if not self.wait():
            self._stop_if_asked()
        step = int(state.step)
        parts = _parts(state)
        obstacles = [line for line in gathered(_obstacle(self._directory, parts)) if line]
        if obstacles:
            self._failed(step, obstacles[0])
            self._stop_if_asked()
            return
        sums = {name: int(checksum(part)) for name, part in parts.items()}
        try:
            response = self._manager.save_checkpointables_async(
                step, {**parts, "progress": {**progress, "checksum": sums}}, force=True
            )
            self._saving = step, response
        except Exception as error:  # a full disk shows here or in the background, as many types
            self._saving = step, error
            if jax.process_count() == 1:  # several have to hear of it at the same point
                self.wait()

    def wait(self) -> bool:
        """Waits for the write in progress; False if the last save failed."""
        if self._saving is not None:
            step, response = self._saving
            self._saving = None
            found = response if isinstance(response, Exception) else failure(response.result)
            failures = [
                line for line in gathered(None if found is None else as_line(found)) if line
            ]
            self._saved = True
            if failures:
                self._broke_off()
                self._failed(step, failures[0])
        return self._saved

    def restore(self, abstract: AnyState) -> tuple[AnyState, dict[str, Any]] | None:
        """The newest readable checkpoint, placed as `abstract`, and its progress; None if none.

        A damaged one is named and moved to `damaged/` in the run directory, and the one before it
        is used.

        Raises:
          CheckpointError: there are checkpoints, but all are damaged.
          CheckpointUnreadable: one could not be read, which may pass.
        """
        damaged = []
        for step in reversed(gathered(self.steps)[0]):
            try:
                parts = _load(self._directory / str(step), _parts(abstract))
            except Damaged as error:
                damaged.append(step)
                self._report(f"checkpoint {self._directory / str(step)} is damaged ({error})")
                continue
            for bad in damaged:
                self._set_aside(bad)
            self._report(f"resuming from checkpoint {self._directory / str(step)}")
            progress = parts.pop("progress")
            counters = parts.pop("counters")
            return dataclasses.replace(abstract, **counters, **parts), progress
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints {damaged} in {self._directory} can be read"
            )
        return None

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        target = self._directory.parent / "damaged" / str(step)
        if is_leader():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self._directory / str(step), target)
        gathered(None)  # the others wait
        self._manager.reload()

    def _broke_off(self) -> None:
        """Clears away what a save that failed has left, in Orbax and in the directory."""
        with contextlib.suppress(Exception):  # it raises the same error again
            self._manager.close()
        gathered(None)  # all have closed
        if is_leader():
            for partial in self._directory.glob("*tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
        gathered(None)
        self._manager = self._open()

    def _stop_if_asked(self) -> None:
        if self._failed_save == "stop":
            raise CheckpointError("stopped, as train.failed_save='stop' says")

    def _failed(self, step: int, why: str) -> None:
        self._saved = False
        kept = (
            f"the last good one is step {self.steps[-1]}"
            if self.steps
            else "there is no earlier one"
        )
        self._report(f"could not save checkpoint {self._directory / str(step)} ({why}); {kept}")


def _obstacle(directory: Path, parts: dict[str, Any]) -> str | None:
    """Why this process could not save, where that shows beforehand.

    Orbax would find out too, but where one of several processes fails, the others wait for it for
    many minutes.
    """
    needed = int(ROOM * sum(x.nbytes for x in jax.tree.leaves(parts))) + SMALL_FILES
    try:
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        return error.strerror or str(error)
    return None if free >= needed else f"it takes {needed:,} bytes, and {free:,} are free"


def load_average(directory: Path, abstract: Any, report: Report) -> tuple[int, Any]:
    """Step and averaged parameters of the newest readable checkpoint of a run; only these are read.

    Raises:
      ValueError: there is none.
      CheckpointError: there are some, but none can be read.
    """
    quieten_orbax()
    if not directory.exists():
        raise ValueError(f"there is no checkpoint in {directory} yet")
    with ocp.training.Checkpointer(directory.absolute()) as manager:
        steps = gathered([checkpoint.step for checkpoint in manager.checkpoints])[0]
    for step in reversed(steps):
        try:
            return step, _load(directory / str(step), {"ema": abstract})["ema"]
        except Damaged as error:
            report(f"checkpoint {directory / str(step)} is damaged ({error})")
    if steps:
        raise CheckpointError(f"no checkpoint in {directory} can be read")
    raise ValueError(f"there is no checkpoint in {directory} yet")


def stored_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, ascending; asks no other process."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def stored_progress(path: Path) -> dict[str, Any]:
    """The progress saved in one checkpoint; asks no other process."""
    with ocp.Context(multiprocessing_options=_alone()):
        return ocp.load_checkpointables(path.absolute(), {"progress": None})["progress"]


def _alone() -> ocp.options.MultiprocessingOptions:
    return ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )


def _parts(state: AnyState) -> dict[str, Any]:
    """A state as it is saved: single arrays together, as `counters`; each tree under its name."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    counters = {name: value for name, value in fields.items() if hasattr(value, "shape")}
    trees = {
        name: value
        for name, value in fields.items()
        if name not in counters and jax.tree.leaves(value)
    }
    return {"counters": counters, **trees}


class Damaged(Exception):
    """A checkpoint cannot be decoded, or not to what was saved; the message says why."""


def _load(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint, as all processes agree that it can be read and is what was saved.

    Each process reads by itself first, so that none waits for another that cannot read.

    Raises:
      Damaged: some process finds it damaged.
      CheckpointUnreadable: some process cannot read it, again and again.
    """
    parts: dict[str, Any] = {}

    def load() -> None:
        with ocp.Context(multiprocessing_options=_alone()):
            parts.update(ocp.load_checkpointables(path.absolute(), {**abstract, "progress": None}))

    error = failure(load)
    for seconds in RETRIES:
        if error is None or kind_of(error) == "damage":
            break
        time.sleep(seconds)
        error = failure(load)
    if error is not None and out_of_memory(error):
        raise error
    found = gathered(None if error is None else [kind_of(error), as_line(error)])
    nobody_sees = all(problem and problem[0] == "missing" for problem in found)
    for process, problem in enumerate(found):
        if problem and problem[0] != "damage" and not nobody_sees:
            raise CheckpointUnreadable(
                f"process {process} cannot read checkpoint {path} ({problem[1]}); nothing was "
                "changed; the same command tries again"
            )
    for problem in filter(None, found):
        raise Damaged(problem[1])
    for name in abstract:
        if int(checksum(parts[name])) != int(np.asarray(parts["progress"]["checksum"][name])):
            raise Damaged(f"the checksum of its {name} is wrong")
    return parts


def quieten_orbax() -> None:
    """Silences Orbax's running commentary, and its warnings about a damaged checkpoint."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
