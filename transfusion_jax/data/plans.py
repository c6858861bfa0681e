"""Packing plans on disk: made once, and memory-mapped by every process that trains on them.

FOLDER/rows-4096-v2/plan.json     counts, the fingerprint, and the size and checksum of each array;
                                  written last
FOLDER/rows-4096-v2/*.npy         the arrays of the plan, and the documents rejected for each reason

FOLDER stands for a split of a data set and for how many positions its images take, so nothing has
to be read to know which plan is the right one.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transfusion_jax.data.packing import Plan, plan
from transfusion_jax.data.sources.dataset import file_digest
from transfusion_jax.data.sources.source import Source
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.files import TEMPORARY, atomic_path, write_atomic

VERIFIED = 1 << 28  # bytes of a plan up to which checksums are compared at every start
ARRAYS = ("row_start", "document", "begin", "end")


def plan_of(source: Source, tokenizer: Tokenizer, row_length: int) -> tuple[Plan, str]:
    """The packing plan of a source, and its fingerprint (see `Plan.fingerprint`).

    It is cached where the source has a folder for plans. Of several processes that need one which
    is not there, one makes it, and the others wait.
    """
    folder = source.assets.plans
    if folder is None:
        return _made(source, tokenizer, row_length)
    folder = folder / f"rows-{row_length}-v{Plan.VERSION}"
    if (found := load_plan(folder)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (found := load_plan(folder)) is None:  # made while this process waited
                save_plan(*_made(source, tokenizer, row_length), folder)
                found = load_plan(folder)
    except OSError:  # the disk is full, or not to be written
        found = None
    return found or _made(source, tokenizer, row_length)


def _made(source: Source, tokenizer: Tokenizer, row_length: int) -> tuple[Plan, str]:
    made = plan(source.lengths(tokenizer), row_length, source.splittable)
    return made, made.fingerprint(source.assets.digest)


def save_plan(made: Plan, fingerprint: str, folder: Path) -> None:
    """Writes a plan atomically, in place of a damaged one if there is one."""
    partial = folder.with_name(folder.name + TEMPORARY)
    try:
        partial.mkdir()
        arrays = {name: getattr(made, name) for name in ARRAYS}
        arrays |= {f"rejected_{i}": x for i, x in enumerate(made.rejected.values())}
        for name, array in arrays.items():
            with atomic_path(partial / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, array)
        sizes = {name: (partial / f"{name}.npy").stat().st_size for name in arrays}
        verified = arrays if sum(sizes.values()) <= VERIFIED else ()
        content = {
            "fingerprint": fingerprint,
            "in_rows": made.in_rows,
            "positions": made.positions,
            "rejected": list(made.rejected),
            "bytes": sizes,
            "sha256": {name: file_digest(partial / f"{name}.npy") for name in verified},
        }
        write_atomic(partial / "plan.json", json.dumps(content, indent=2).encode())
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_plan(folder: Path) -> tuple[Plan, str] | None:
    """A plan, memory-mapped, and its fingerprint; None if there is none or files are damaged.

    Files are compared by checksum, and by size where all together are larger than `VERIFIED`: every
    process of a run would read them whole.
    """
    try:
        content = json.loads((folder / "plan.json").read_text())
        by_checksum = sum(content["bytes"].values()) <= VERIFIED
        for name, size in content["bytes"].items():
            file = folder / f"{name}.npy"
            if file.stat().st_size != size:
                return None
            if by_checksum and file_digest(file) != content["sha256"][name]:
                return None
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        rejected = {
            reason: np.load(folder / f"rejected_{i}.npy", mmap_mode="r")
            for i, reason in enumerate(content["rejected"])
        }
        counts = content["in_rows"], content["positions"]
        return Plan(*arrays, rejected, *counts), content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process makes this plan; on a file system without locks, all may make it."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
