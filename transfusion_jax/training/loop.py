"""The training loop: dispatch a step, read the metrics of the one before, save, stop when asked."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from transfusion_jax.errors import ComeAgain, ProcessLost, WorkFailed
from transfusion_jax.parallel.processes import is_leader, noticing_loss
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.training.checkpoint import Report
from transfusion_jax.training.directory import RunDirectory
from transfusion_jax.training.feed import Feed
from transfusion_jax.training.goodput import Account, open_account
from transfusion_jax.training.instruments import Instruments
from transfusion_jax.training.monitor import Monitor
from transfusion_jax.training.settings import Settings
from transfusion_jax.training.update import Metrics
from transfusion_jax.training.watchdog import TrainingFailed, Watch


@dataclass(frozen=True)
class Run:
    """A run that is ready to train: all that the machine knows of what it trains.

    A trainer writes its state, its step, its data and its description, and makes one of these.
    """

    directory: RunDirectory
    settings: Settings
    mesh: Mesh
    feed: Feed
    initialise: Callable[[], Any]
    """Makes the state of step 0, on its devices."""
    step: Callable[[Any, Any], tuple[Any, Metrics]]
    """(state, batch) -> (state, metrics), compiled. `loss` and `skipped_in_a_row` are metrics."""
    title: str
    """What is trained, in a line."""
    details: tuple[tuple[str, str], ...] = ()
    """Label and text of more lines about it."""
    instruments: Instruments = Instruments()

    def description(self) -> str:
        """What is trained, on what, for how long."""
        left = self.settings.steps - self.directory.start
        amount = self.feed.amount
        lines = (
            *self.details,
            (
                "training",
                f"{left} of {self.settings.steps} steps of {amount:,} {self.feed.unit} "
                f"({amount * left / 1e6:,.1f} M)",
            ),
            (
                "devices",
                f"{self.mesh.size} {self.mesh.devices.flat[0].platform} "
                f"({', '.join(f'{axis}={size}' for axis, size in self.mesh.shape.items())})",
            ),
            ("run", str(self.directory.path)),
        )
        return "\n".join([self.title, *(f"  {label:10}{text}" for label, text in lines)])


@dataclass(frozen=True)
class Outcome:
    state: Any
    seconds: float
    """Of training, over all its restarts."""
    stopped_by: str | None
    """The signal that ended it early."""
    account: Account
    """Where the time of the run went."""


def train(
    run: Run, report: Report, watch: Watch | None = None, begun: float | None = None
) -> Outcome:
    """Trains to the last step, or until a signal asks to stop; either way the state is saved.

    Without a watch of the caller's, it keeps one of its own.

    Args:
      begun: when this process began (as `time.time()`), for the run's account of its time.

    Raises:
      TrainingFailed: too many steps in a row without finite gradients, or a checkpoint was not
        written that must be.
      ComeAgain: a signal asked to stop, and the state could not be saved.
      ProcessLost: another process of the run is gone.
    """
    report(run.description())
    account = _account(run, report, begun)
    try:
        with contextlib.ExitStack() as stack, noticing_loss():
            stack.callback(account.write)
            outcome = _train(run, report, watch or stack.enter_context(Watch()), account)
    except ProcessLost:
        raise  # closing would wait for the process that is gone
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, WorkFailed):
            run.directory.close()
        raise  # closing would wait for the others, who know of no error
    run.directory.close()
    step = int(outcome.state.step)
    if outcome.stopped_by and step:
        report(
            f"stopped by {outcome.stopped_by} at step {step}, saved; the same command resumes it"
        )
    elif outcome.stopped_by:
        report(f"stopped by {outcome.stopped_by} before the first step")
    else:
        report(f"trained {step} steps in {outcome.seconds:.0f} s")
    return outcome


def _account(run: Run, report: Report, begun: float | None) -> Account:
    """The run's account, which one process keeps."""
    if not is_leader():
        return Account()
    return open_account(run.directory.path, run.directory.start, report, begun)


def _train(run: Run, report: Report, watch: Watch, account: Account) -> Outcome:
    if run.directory.start >= run.settings.steps:
        return Outcome(run.directory.state, run.directory.train_seconds, None, account)
    report("compiling the training step; time left is shown from the second step on")
    begin = time.perf_counter() - run.directory.train_seconds
    state, stopped_by = _take_steps(run, begin, watch, account, report)
    with account.during("checkpoints"):
        saved = run.directory.checkpoints.wait()
    if not saved and stopped_by and run.settings.failed_save == "continue":
        raise ComeAgain(
            f"stopped by {stopped_by} at step {int(state.step)}, which could not be saved; the "
            "same command resumes from the checkpoint before"
        )
    if not saved:
        raise TrainingFailed(
            f"trained to step {int(state.step)}, but its checkpoint could not be saved"
        )
    return Outcome(state, time.perf_counter() - begin, stopped_by, account)


def _take_steps(
    run: Run, begin: float, watch: Watch, account: Account, report: Report
) -> tuple[Any, str | None]:
    """The last state, saved, and the signal that ended the run early; `begin` is a clock time."""
    settings = run.settings
    start = run.directory.start
    sharding = batch_sharding(run.mesh)
    with jax.set_mesh(run.mesh):
        state = run.initialise() if run.directory.state is None else run.directory.state
    if stopped_by := watch.moved():
        return state, stopped_by
    batches = run.feed.read(start, sharding)
    pending = None
    monitor = Monitor(
        run.directory.path,
        settings,
        start,
        run.feed,
        run.instruments,
        account,
        list(run.mesh.devices.flat),
        report,
    )
    with monitor, account.during("steps"):
        for step in range(start + 1, settings.steps + 1):
            with monitor.waiting(pending):
                batch = next(batches)
            with jax.set_mesh(run.mesh), monitor.dispatching(step, batch):
                state, metrics = run.step(state, run.feed.on_devices(batch, sharding))
            if pending is not None:
                monitor.read(*pending)
            pending = step, metrics
            stopped_by = monitor.observe(step, state, watch.check) or watch.moved()
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopped_by:
                monitor.read(*pending)
                pending = None
                with monitor.saving(step):
                    run.directory.save(state, time.perf_counter() - begin)
            if stopped_by:
                break
    return state, stopped_by
