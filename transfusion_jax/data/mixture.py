"""The mixture: which source gives row i of a run, and how often each source has been read."""

import math
import sys
from collections.abc import Sequence

import grain.python
import numpy as np

from transfusion_jax.config import DataConfig


class Mixture(grain.python.DatasetSelectionMap):
    """Maps row i to (source, row of that source), by weights that may change during the run.

    Each source has its share of any first rows of a phase: to within one row of two or three
    sources, to within one and a half of more. Sources a, b with weights 2, 1 give rows a b a a b a
    ... A new phase continues each source where the phase before stopped.
    """

    def __init__(self, data: DataConfig, steps: int):
        weights = [
            [source.weight for source in data.sources],
            *(phase.weights for phase in data.phases),
        ]
        starts = [0, *(first_step(phase.start, steps) * data.batch_rows for phase in data.phases)]
        self._phases = [(start, _shares(w)) for start, w in zip(starts, weights, strict=True)]
        self._before = [np.zeros(len(data.sources), np.int64)]
        for (start, shares), (end, _) in zip(self._phases[:-1], self._phases[1:], strict=True):
            self._before.append(self._before[-1] + self._counts(end - start, shares))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        phase = self._phase(row)
        at = row - self._phases[phase][0]
        for source, share in self._phases[phase][1]:
            taken = _taken(at, share)
            if _taken(at + 1, share) > taken:
                return source, int(self._before[phase][source]) + taken
            at -= taken
        raise AssertionError("the last source takes what is left")

    def counts(self, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows`."""
        phase = self._phase(max(rows - 1, 0))
        start, shares = self._phases[phase]
        return self._before[phase] + self._counts(rows - start, shares)

    def _phase(self, row: int) -> int:
        return max(i for i, (start, _) in enumerate(self._phases) if start <= row)

    def _counts(self, rows: int, shares: Sequence[tuple[int, float]]) -> np.ndarray:
        counts = np.zeros_like(self._before[0])
        for source, share in shares:
            counts[source] = _taken(rows, share)
            rows -= counts[source]
        return counts


def first_step(start: float, steps: int) -> int:
    """The first step at or after this fraction of the run.

    The product may miss a whole step by a rounding error (0.07 * 100 is 7.000000000000001), so what
    is less than a millionth of a step beyond one is that step.
    """
    return math.ceil(start * steps - 1e-6)


def _shares(weights: Sequence[float]) -> list[tuple[int, float]]:
    """Sources with weight, heaviest first, each with its share of what those before it leave."""
    order = sorted((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: -weights[i])
    left = [math.fsum(weights[i] for i in order[at:]) for at in range(len(order))]
    return [(i, weights[i] / rest) for i, rest in zip(order, left, strict=True)]


def _taken(rows: int, share: float) -> int:
    """Of so many rows, those of a source with this share: with a share of 1, all."""
    return math.floor(rows * share + 0.5)
