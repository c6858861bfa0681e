"""File names by the million, in two arrays that processes can memory-map and share."""

import os
from collections.abc import Sequence

import numpy as np


class Names(Sequence[str]):
    """Name i is bytes [starts[i], starts[i + 1]) of `content`, as file systems store it."""

    def __init__(self, content: np.ndarray, starts: np.ndarray) -> None:
        self.content = content
        self.starts = starts

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        begin, end = self.starts[index], self.starts[index + 1]
        return os.fsdecode(self.content[begin:end].tobytes())
