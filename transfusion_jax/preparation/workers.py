"""Processes that make shards, each shards of its own: threads of one process would wait for its interpreter."""

import ctypes
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_jax.host import keep_freed_memory
from transfusion_jax.preparation.readers.inputs import open_input
from transfusion_jax.preparation.readers.raw import Columns, Reader
from transfusion_jax.preparation.shards import Settings, finish_shard, load, write_shard

PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG
DRAWN = 0.1  # seconds between two looks at how far the processes are


@dataclass(frozen=True)
class Job:
    """What all shards of a data set are made from; it can be sent to another process."""

    inputs: tuple[str, ...]
    columns: Columns
    out: Path
    shard_items: int
    settings: Settings

    def shard(self, k: int) -> Path:
        return self.out / "shards" / f"{k:06}.arrayrecord"

    def account(self, k: int) -> Path:
        """What became of the items of shard k; once it is there, so is the shard."""
        return self.out / "parts" / f"{k:06}.msgpack"


def chosen(
    inputs: Sequence[tuple[str, Reader]], numbers: range
) -> Iterator[tuple[str, Reader, int]]:
    """(input, reader, index) of the items with these numbers."""
    starts = np.cumsum([0, *(len(reader) for _, reader in inputs)])
    for number in numbers:
        at = int(np.searchsorted(starts, number, side="right")) - 1
        yield *inputs[at], number - int(starts[at])


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
            pool.shutdown(cancel_futures=True)  # waits, so that nobody writes any more
            raise


def _begin(job: Job, done: Any) -> None:
    """Readies a process, which shall not outlive the one that began it, nor answer the keyboard itself."""
    global _job, _inputs, _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PARENT_DEATH, signal.SIGKILL)
    keep_freed_memory()
    warnings.filterwarnings("ignore", module=r"PIL\.")
    _job, _done = job, done
    _inputs = [reader for path in job.inputs for reader in open_input(path, job.columns)]


def _make(k: int) -> None:
    items = sum(len(reader) for _, reader in _inputs)
    numbers = range(k * _job.shard_items, min((k + 1) * _job.shard_items, items))
    loaded = (
        (name, load(reader, index, _job.settings))
        for name, reader, index in chosen(_inputs, numbers)
    )
    finish_shard(
        write_shard(loaded, _job.shard(k), _job.settings, _count), _job.shard(k), _job.account(k)
    )


def _count(items: int) -> None:
    with _done.get_lock():
        _done.value += items
