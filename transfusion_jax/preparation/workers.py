"""Processes that make shards, each shards of its own: threads would wait for one interpreter."""

import ctypes
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.host import keep_freed_memory
from transfusion_jax.preparation.readers.collection import Each
from transfusion_jax.preparation.readers.raw import Reader
from transfusion_jax.preparation.readers.stored import load_inputs
from transfusion_jax.preparation.shards import Settings, finish_shard, load, write_shard

PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG
DRAWN = 0.1  # seconds between two looks at how far the processes are
MANY = 64  # files that are worth starting processes for, to index them

Named = tuple[str, Reader]
"""A reader and the name of its input in the ledger."""


@dataclass(frozen=True)
class Job:
    """What all shards of a data set are made from; it can be sent to another process."""

    out: Path
    bounds: np.ndarray
    """Shard k holds the items [bounds[k], bounds[k + 1])."""
    settings: Settings

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def inputs(self) -> Path:
        """What was found in the inputs, for all processes."""
        return self.out / "parts" / "inputs"

    def items(self, k: int) -> range:
        """Numbers of the items of shard k."""
        return range(int(self.bounds[k]), int(self.bounds[k + 1]))

    def shard(self, k: int) -> Path:
        """The ArrayRecord file of shard k."""
        return self.out / "shards" / f"{k:06}.arrayrecord"

    def ledger(self, k: int) -> Path:
        """What became of the items of shard k; where this file is, the shard is done."""
        return self.out / "parts" / f"{k:06}.msgpack"


def chosen(readers: Sequence[Named], numbers: range) -> Iterator[tuple[str, Reader, int]]:
    """(input, reader, index) of the items with these numbers."""
    starts = np.cumsum([0, *(len(reader) for _, reader in readers)])
    for number in numbers:
        at = int(np.searchsorted(starts, number, side="right")) - 1
        yield *readers[at], number - int(starts[at])


def make_shards(job: Job, shards: Sequence[int], workers: int) -> Iterator[int]:
    """Makes these shards on so many processes; yields the numbers of items as they are done."""
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _begin, (job, done)) as pool:
        waiting, seen = {pool.submit(_make, k) for k in shards}, 0
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=DRAWN)
                for future in finished:
                    future.result()
                yield done.value - seen
                seen = done.value
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits until no process writes any more
            raise


def on_processes(workers: int) -> Each:
    """A `map` that uses so many processes where there is enough to do."""

    def each(function: Callable, files: Iterable) -> Iterable:
        files = list(files)
        if workers == 1 or len(files) < MANY:
            return list(map(function, files))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _guard) as pool:
            return list(pool.map(function, files, chunksize=max(len(files) // (8 * workers), 1)))

    return each


def _guard() -> None:
    """Readies a process: it ends with the one that started it, and ignores the keyboard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PARENT_DEATH, signal.SIGKILL)
    keep_freed_memory()
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _begin(job: Job, done: Any) -> None:
    global _job, _readers, _done
    _guard()
    _job = job
    _done = done
    _readers = [(found.name, found.open()) for found in load_inputs(job.inputs)]


def _make(k: int) -> None:
    items = chosen(_readers, _job.items(k))
    loaded = ((name, load(reader, index, _job.settings)) for name, reader, index in items)
    ledger = write_shard(loaded, _job.shard(k), _job.settings, _count)
    finish_shard(ledger, _job.shard(k), _job.ledger(k))


def _count(items: int) -> None:
    with _done.get_lock():
        _done.value += items
