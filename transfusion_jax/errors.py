"""What goes wrong, by whose fault: the exit code of the command line follows from the type.

A ValueError is bad input, explained in one line (exit code 2). A WorkFailed is work that ran and
failed (exit code 1). A ComeAgain is work that was stopped, and continues when the same command is
started again (exit code 42).
"""

AGAIN = 42
"""Exit code: the same command continues the work."""


class WorkFailed(Exception):
    """The work ran and failed; the message says all there is to say."""


class ComeAgain(WorkFailed):
    """The work was stopped; the same command continues it."""


class Stopped(ComeAgain):
    """A signal asked to stop; `by` says which, and to which process."""

    def __init__(self, by: str):
        super().__init__(f"stopped by {by}; the same command does the rest")
        self.by = by


class ProcessLost(ComeAgain):
    """Another process of the run is gone."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)
