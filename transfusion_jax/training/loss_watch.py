"""Watches the loss: names the steps at which it jumps, stops falling, or is not finite.

A spike is a loss above median + k * max(1.4826 * MAD, 1 % of the median) of the losses before it,
with MAD the median absolute deviation, which 1.4826 turns into the standard deviation of a normal
distribution. The floor keeps smooth losses from making spikes of trifles. Of losses above the bound
in a row, the first is named.

A stall is either of two things. The loss is constant: of so many steps, all within a millionth,
though every step draws other rows and noise. Or it does not improve: of blocks of `stall_steps`
steps, two in a row have a median no lower than the lowest of the blocks before. One block would be
chance where progress is slow; noise hides progress through two only where there is next to none.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

NORMAL = 1.4826
FLOOR = 0.01
CONSTANT = 1e-6
BLOCKS = 2


@dataclass(frozen=True)
class LossWatch:
    """What to look for."""

    spike_window: int
    """Losses that a spike is measured against; half of them are needed."""
    spike_deviations: float
    """k; 0: spikes are not looked for."""
    stall_steps: int
    """0: a loss that does not improve is not looked for."""
    seed: int
    """Of the data: row i is a function of (seed, i)."""
    rows: int
    """Of a global batch."""
    changes: frozenset[int] = frozenset()
    """Steps from which on the data is another mixture: the losses before say nothing."""


@dataclass(frozen=True)
class Event:
    """Something about the loss of one step."""

    step: int
    kind: str
    """"spike", "stall" or "not_finite"."""
    text: str
    """In words."""
    numbers: dict[str, Any]

    def line(self, watch: LossWatch) -> str:
        first, last = self.rows(watch)
        return (
            f"{self.kind.replace('_', ' ')} at step {self.step}: {self.text}; rows {first} to "
            f"{last} of seed {watch.seed} (transfusion-jax inspect EXPERIMENT --run-dir RUN "
            f"--row {first})"
        )

    def row(self, watch: LossWatch) -> dict[str, Any]:
        """For `events.jsonl`."""
        first, last = self.rows(watch)
        where = {"seed": watch.seed, "first_row": first, "last_row": last}
        return {"step": self.step, "kind": self.kind, **where, **self.numbers, "text": self.text}

    def rows(self, watch: LossWatch) -> tuple[int, int]:
        """First and last row, in the run's own numbering, of the batch of this step."""
        return (self.step - 1) * watch.rows, self.step * watch.rows - 1


class LossWatcher:
    """Reads the losses one by one. It starts without a past, also where a run resumes."""

    def __init__(self, watch: LossWatch):
        self.watch = watch
        self._forget()

    def _forget(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.watch.spike_window)
        self._above = False
        self._constant = False
        self._block: list[float] = []
        self._lowest = math.inf
        self._worse = 0

    def read(self, step: int, loss: float, skipped: bool) -> list[Event]:
        """What there is to say about the loss of a step; `skipped`: its update was not made."""
        if step in self.watch.changes:
            self._forget()
        if skipped or not math.isfinite(loss):
            what = "gradients" if math.isfinite(loss) else "loss"
            numbers = {"loss": loss if math.isfinite(loss) else None}
            return [Event(step, "not_finite", f"the {what} is not finite", numbers)]
        events = [*self._spike(step, loss), *self._constancy(step, loss), *self._stall(step, loss)]
        self._recent.append(loss)
        return events

    def _spike(self, step: int, loss: float) -> list[Event]:
        watch = self.watch
        if not watch.spike_deviations or 2 * len(self._recent) < watch.spike_window:
            return []
        middle = median(self._recent)
        deviation = NORMAL * median([abs(x - middle) for x in self._recent])
        bound = middle + watch.spike_deviations * max(deviation, FLOOR * abs(middle))
        before = self._above
        self._above = loss > bound
        if before or not self._above:
            return []
        text = f"loss {loss:.4g} is above {bound:.4g}; the median of the steps before is "
        numbers = {"loss": loss, "bound": bound, "median": middle}
        return [Event(step, "spike", f"{text}{middle:.4g}", numbers)]

    def _constancy(self, step: int, loss: float) -> list[Event]:
        before = self._constant
        full = len(self._recent) == self.watch.spike_window
        spread = max(*self._recent, loss) - min(*self._recent, loss) if full else math.inf
        self._constant = spread <= CONSTANT * abs(loss)
        if before or not self._constant:
            return []
        text = f"the loss has been {loss:.6g} for {self.watch.spike_window} steps"
        return [Event(step, "stall", text, {"loss": loss})]

    def _stall(self, step: int, loss: float) -> list[Event]:
        size = self.watch.stall_steps
        if not size:
            return []
        self._block.append(loss)
        if len(self._block) < size:
            return []
        middle = median(self._block)
        self._block = []
        if middle < self._lowest:
            self._lowest = middle
            self._worse = 0
            return []
        self._worse += 1
        if self._worse != BLOCKS:
            return []
        text = (
            f"the loss has not improved for {BLOCKS * size} steps: its median over the last {size} "
            f"is {middle:.4g}, and was {self._lowest:.4g}"
        )
        numbers = {"loss": loss, "median": middle, "lowest_median": self._lowest}
        return [Event(step, "stall", text, numbers)]
