"""`--profile START:STOP`: a trace of some steps, which xprof and TensorBoard open."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from transfusion_jax.errors import require
from transfusion_jax.training.checkpoint import Report


@dataclass(frozen=True)
class Window:
    """Steps `start` to `stop`, both included."""

    start: int
    stop: int

    @staticmethod
    def parse(text: str, steps: int) -> "Window":
        """Of START:STOP, for a run of so many steps; raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        require(found is not None, f"--profile {text} is not START:STOP, as in 20:25")
        window = Window(int(found[1]), int(found[2]))
        require(
            1 <= window.start <= window.stop <= steps,
            f"--profile {text} must be steps from 1 to train.steps={steps}, the first one first",
        )
        return window


class Profiler:
    """Traces the steps of a window into `directory`; without a window it does nothing.

    Each of several processes has a folder of its own there: JAX names files by host alone.
    """

    def __init__(self, window: Window | None, directory: Path, report: Report):
        self._window = window
        self._directory = directory
        self._report = report
        self._on = False

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """To be entered while the step is dispatched; the first of the window starts the trace."""
        if self._window is not None and step == self._window.start:
            several = jax.process_count() > 1
            own = f"process-{jax.process_index()}" if several else ""
            jax.profiler.start_trace(str(self._directory / own))
            self._on = True
        if not self._on:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def finished(self, step: int) -> None:
        """This step has ended on the devices; the last of the window ends the trace."""
        if self._on and step >= self._window.stop:
            self.close()

    def close(self) -> None:
        """Ends and writes the trace, if there is one."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            self._report(
                f"profiled steps {self._window.start} to {self._window.stop} into "
                f"{self._directory} (tensorboard --logdir {self._directory})"
            )
