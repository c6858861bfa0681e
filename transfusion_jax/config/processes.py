"""How the processes of a run find and watch one another."""

from dataclasses import dataclass

from transfusion_jax.errors import require


@dataclass(frozen=True)
class ProcessesConfig:
    """Times in seconds; the defaults suit a pod (our choice)."""

    initialization_timeout: int = 300
    """How long processes wait at the start for the others."""
    heartbeat_timeout: int = 100
    """A process that has not been heard of for so long is taken for lost, and the others end."""
    shutdown_timeout: int = 300
    """How long a process that is done waits for the others."""
    stall_timeout: int = 3600
    """A process in which nothing has moved for so long (no step, checkpoint or batch of
    validation or evaluation) writes the stacks of its threads and ends; longer than a compilation
    and than making a packing plan. 0: never."""

    def __post_init__(self):
        for name in ("initialization_timeout", "heartbeat_timeout", "shutdown_timeout"):
            value = getattr(self, name)
            require(value > 0, f"processes.{name}={value} must be positive")
        require(
            self.stall_timeout >= 0,
            f"processes.stall_timeout={self.stall_timeout} must not be negative",
        )
