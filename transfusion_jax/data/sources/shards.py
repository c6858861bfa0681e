"""The shards of a data set on disk, read at random by any number of threads."""

import functools
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for reading one record at a time


def open_limit() -> int:
    """Shards that may be open at one time: a quarter of the files this process may open, or 512."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else max(min(512, soft // 4), 1)


@functools.lru_cache(maxsize=open_limit())
def _reader(path: str, identity: tuple[int, ...]) -> ArrayRecordReader:
    """An open shard, for all data sets of the process; the least recently used one is closed.

    It is closed when the last thread that reads from it lets go of it. `identity` tells the file
    from others that had its path before.
    """
    return ArrayRecordReader(path, OPTIONS)


class Shards:
    """Records of several ArrayRecord files, numbered one file after another."""

    def __init__(self, folder: Path, names: Sequence[str], records: Sequence[int]) -> None:
        self._paths = [folder / name for name in names]
        self._identities: dict[int, tuple[int, ...]] = {}
        self._starts = np.cumsum([0, *records], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> bytes:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        reader = _reader(str(self._paths[shard]), self._identity(shard))
        return reader.read([number - int(self._starts[shard])])[0]

    def _identity(self, shard: int) -> tuple[int, ...]:
        """Of the file as it was when it was first read from."""
        if shard not in self._identities:
            found = self._paths[shard].stat()
            self._identities[shard] = found.st_dev, found.st_ino, found.st_mtime_ns
        return self._identities[shard]
