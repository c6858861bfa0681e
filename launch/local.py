"""Starts the processes of one run on this machine, and again when they ask for it.

python launch/local.py --processes 2 -- experiments/digits.py --run-dir runs/digits
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from launcher import GRACE, RETRIABLE, STOPPED, Parser, check_positive, fail, parse, parser

KINDS = ("cpu", "gpu")


class Group:
    """Processes that live and end together."""

    def __init__(self, commands: Sequence[Sequence[str]], settings: Sequence[Mapping[str, str]]):
        # In sessions of their own, or Ctrl-C would reach them beside this process's SIGTERM.
        self._processes = [
            subprocess.Popen(command, env={**os.environ, **setting}, start_new_session=True)
            for command, setting in zip(commands, settings, strict=True)
        ]

    def ask_to_stop(self) -> None:
        """SIGTERM to all: they save and end."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def codes(self, patience: float, is_stopping: Callable[[], bool]) -> list[int]:
        """Waits for the end of all, and returns the exit codes of those that ended by themselves.

        Once one has ended, the others have `patience` seconds to notice; then they are killed.
        """
        deadline = None
        while (running := [p for p in self._processes if p.poll() is None]) and (
            deadline is None or time.monotonic() < deadline
        ):
            if deadline is None and (len(running) < len(self._processes) or is_stopping()):
                deadline = time.monotonic() + patience
            time.sleep(0.1)
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        ended = [p.returncode for p in self._processes if p not in running]
        return [code if code >= 0 else 128 - code for code in ended] or [128 + signal.SIGKILL]


def outcome(codes: Sequence[int]) -> int:
    """One exit code for all: of a failure that no restart mends, else of one that it does, or 0."""
    failed = [code for code in codes if code]
    final = [code for code in failed if code not in RETRIABLE]
    return (final or failed or [0])[0]


def commands(verb: str, count: int, train: Sequence[str], port: int) -> list[list[str]]:
    """The command of each process."""
    joining = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
    return [
        ["transfusion-jax", verb, *train]
        + ([*joining, "--process-id", str(process)] if count > 1 else [])
        for process in range(count)
    ]


def settings(kind: str, count: int) -> list[dict[str, str]]:
    """What each process has in its environment: CPUs alone, or one GPU each."""
    if kind == "cpu":
        return [{"JAX_PLATFORMS": "cpu"}] * count
    return [{"CUDA_VISIBLE_DEVICES": str(process)} for process in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def saved_step(train: Sequence[str]) -> int:
    """The newest checkpoint's step in the run directory that a command names; 0 if none is seen.

    Only what is written whole has a step for a name.
    """
    given = Parser(add_help=False, allow_abbrev=False)
    given.add_argument("--run-dir")
    run_dir = given.parse_known_args(train)[0].run_dir
    names = []
    if run_dir:
        with contextlib.suppress(OSError):  # none yet, or the file system does not answer
            names = os.listdir(os.path.join(run_dir, "checkpoints"))
    return max((int(name) for name in names if re.fullmatch("[0-9]+", name)), default=0)


class Run:
    """Check and training, and what to do with signals meanwhile."""

    def __init__(self, kind: str, count: int, train: Sequence[str], patience: float):
        self._settings = settings(kind, count)
        self._train = train
        self._patience = patience
        self._group: Group | None = None
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        if self._group is not None:
            self._group.ask_to_stop()

    def once(self, verb: str) -> int:
        """Runs all processes of a command to their end."""
        made = commands(verb, len(self._settings), self._train, free_port())
        try:
            self._group = Group(made, self._settings)
        except FileNotFoundError:
            fail("transfusion-jax is not installed, or not on the PATH")
        if self._stopping:  # the signal came while they were started
            self._group.ask_to_stop()
        return outcome(self._group.codes(self._patience, lambda: self._stopping))

    def until_done(self, restarts: int) -> int:
        """Checks and trains; again after a retriable exit code, at most `restarts` times without a
        checkpoint further than all before."""
        left, furthest = restarts, saved_step(self._train)
        while True:
            code = self.once("check")
            if code == 0:
                code = STOPPED if self._stopping else self.once("train")
            if (step := saved_step(self._train)) > furthest:
                left, furthest = restarts, step
            if code not in RETRIABLE or left == 0:
                return code
            if self._stopping:
                return STOPPED  # also where `check`, which has nothing to save, was killed
            left -= 1
            print(f"exit code {code}: starting again, {left} restarts left", flush=True)


def main(words: Sequence[str]) -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument(
        "--processes", type=int, required=True, metavar="N", help="processes of the run"
    )
    made.add_argument(
        "--kind",
        default="cpu",
        choices=KINDS,
        help="what they compute on; with gpu, process I has GPU I alone (default: cpu)",
    )
    made.add_argument(
        "--patience",
        type=float,
        default=GRACE,
        metavar="S",
        help="seconds that the others have to end once one has ended, or after SIGTERM "
        f"(default: {GRACE})",
    )
    arguments, train = parse(made, words)
    check_positive(processes=arguments.processes)
    if arguments.dry_run:
        for verb in ("check", "train"):
            planned = commands(verb, arguments.processes, train, port=1234)
            given = settings(arguments.kind, arguments.processes)
            for command, setting in zip(planned, given, strict=True):
                (variable,) = setting.items()
                print(f"$ {'='.join(variable)} {shlex.join(command)}")
        return 0
    run = Run(arguments.kind, arguments.processes, train, arguments.patience)
    return run.until_done(arguments.restarts)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
