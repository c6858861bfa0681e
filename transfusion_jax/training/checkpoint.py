"""Checkpoints: all that training needs to resume, saved together by Orbax, in the background.

Each holds the fields of a state (parameters, average, optimizer, counters) and the run's progress.
Each field is saved with a checksum, computed on the devices: the sum, modulo 2^32, of the bit
patterns of all elements. The sum does not depend on order or sharding, so a checkpoint can be
verified on any mesh, and damage that still decodes is found.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax import Array

from transfusion_jax.errors import WorkFailed
from transfusion_jax.training.state import AnyState

Report = Callable[[str], None]
FULL = os.strerror(errno.ENOSPC)


class CheckpointError(WorkFailed):
    """No checkpoint of a run can be read, or the last one could not be written."""


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
    """The checkpoints of one run directory; the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int, report: Report):
        _quieten_orbax()
        self._directory = directory
        self._keep = keep
        self._report = report
        directory.mkdir(parents=True, exist_ok=True)
        self._manager = self._open()
        self._saving: tuple[int, ocp.AsyncResponse] | None = None
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
        """Starts writing in the background. A write that fails is reported, not raised."""
        self.wait()
        step = int(state.step)
        parts = _parts(state)
        sums = {name: int(checksum(part)) for name, part in parts.items()}
        try:
            response = self._manager.save_checkpointables_async(
                step, {**parts, "progress": {**progress, "checksum": sums}}, force=True
            )
            self._saving = step, response
            self._saved = True
        except Exception as error:  # a full disk shows here or in the background, as many types
            self._failed(step, error)

    def wait(self) -> bool:
        """Waits for the write in progress; False if the last save failed."""
        if self._saving is not None:
            step, response = self._saving
            self._saving = None
            try:
                response.result()
            except Exception as error:
                self._failed(step, error)
        return self._saved

    def restore(self, abstract: AnyState) -> tuple[AnyState, dict[str, Any]] | None:
        """The newest readable checkpoint, placed as `abstract`, and its progress; None if none.

        A damaged one is named and moved to `damaged/` in the run directory, and the one before it
        is used.

        Raises:
          CheckpointError: there are checkpoints, but none can be read.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                parts = _load(self._manager, step, _parts(abstract))
            except Exception as error:  # every kind of damage raises something else
                damaged.append(step)
                self._report(
                    f"checkpoint {self._directory / str(step)} is damaged ({_line(error)})"
                )
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
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self._directory / str(step), target)
        self._manager.reload()

    def _failed(self, step: int, error: Exception) -> None:
        self._saved = False
        with contextlib.suppress(Exception):  # it raises the same error again
            self._manager.close()
        for partial in self._directory.glob("*tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        self._manager = self._open()
        kept = (
            f"the last good one is step {self.steps[-1]}"
            if self.steps
            else "there is no earlier one"
        )
        self._report(f"could not save checkpoint {step} ({_line(error)}); {kept}")


def load_average(directory: Path, abstract: Any, report: Report) -> tuple[int, Any]:
    """Step and averaged parameters of the newest readable checkpoint of a run; only these are read.

    Raises:
      ValueError: there is none.
      CheckpointError: there are some, but none can be read.
    """
    _quieten_orbax()
    if not directory.exists():
        raise ValueError(f"there is no checkpoint in {directory} yet")
    with ocp.training.Checkpointer(directory.absolute()) as manager:
        for checkpoint in reversed(manager.checkpoints):
            try:
                return checkpoint.step, _load(manager, checkpoint.step, {"ema": abstract})["ema"]
            except Exception as error:  # every kind of damage raises something else
                report(f"checkpoint {directory / str(checkpoint.step)} is damaged ({_line(error)})")
        if manager.checkpoints:
            raise CheckpointError(f"no checkpoint in {directory} can be read")
    raise ValueError(f"there is no checkpoint in {directory} yet")


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


def _load(
    manager: ocp.training.Checkpointer, step: int, abstract: dict[str, Any]
) -> dict[str, Any]:
    parts = manager.load_checkpointables(step, {**abstract, "progress": None})
    for name in abstract:
        if int(checksum(parts[name])) != int(np.asarray(parts["progress"]["checksum"][name])):
            raise ValueError(f"the checksum of its {name} is wrong")
    return parts


def _quieten_orbax() -> None:
    """Silences Orbax's running commentary, and its warnings about a damaged checkpoint."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _line(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if FULL in text:
        return FULL
    return text if len(text) < 200 else text[:200] + "..."
