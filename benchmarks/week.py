"""An imagined week of a pod in some minutes: real processes, real faults, nothing may be lost.

    python benchmarks/week.py

Two processes train a small model through `launch/local.py`, which starts them again; --steps steps
are a week. Faults come as in the training of Llama 3, 466 interruptions in 54 days of 16,384 GPUs
(arXiv 2407.21783, section 3.3.4), scaled to --chips, at random moments. Kinds are our choice, in
turn: SIGKILL, SIGSTOP (a hang), SIGTERM (a machine is taken away), to a random process. The clock
is the steps taken, with those that were repeated, so a seed means the same faults, to a few steps.

A run without faults follows. Exit code 1 unless every step is in the log once, and every row that
was ever logged, also those that a restart took back, has the same losses: another row of data would
change them. Needs Linux (/proc).
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from runpy import run_path

import numpy as np

from transfusion_jax.config import Experiment, ProcessesConfig
from transfusion_jax.training.metrics import read_metrics

PROJECT = Path(__file__).parents[1]
HOURS = 7 * 24
RATE = 466 / (54 * 24) / 16384  # interruptions per hour and chip
PROCESSES = 2
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)


def config() -> Experiment:
    """The experiment: this file is also what `train` is given."""
    base = run_path(str(PROJECT / "experiments" / "digits.py"))["config"]()
    return replace(
        base,
        model=replace(base.model, layers=1, width=32, heads=2, mlp_width=64),
        data=replace(base.data, batch_rows=4),
        optimizer=replace(base.optimizer, warmup_steps=2),
        train=replace(base.train, log_every=1),
        processes=ProcessesConfig(heartbeat_timeout=10, stall_timeout=300),
        evaluation=(),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, default=1024, help="of the pod")
    parser.add_argument("--faults", type=int, help="in the week (default: by the published rate)")
    parser.add_argument("--steps", type=int, default=336, help="in the week")
    parser.add_argument("--restart-minutes", type=float, default=15.0, help="of the imagined pod")
    parser.add_argument("--seed", type=int, default=2)
    return parser.parse_args()


@dataclass
class Fault:
    at: int  # steps taken by then, repeated ones included
    signal: signal.Signals
    process: int
    time: float = 0.0
    step: int = 0  # the last one logged
    logged: int | None = None  # rows until the run was started again; None: it was not


def draw(args: argparse.Namespace) -> list[Fault]:
    """The faults of the week, in their order."""
    random = np.random.default_rng(args.seed)
    count = random.poisson(RATE * args.chips * HOURS) if args.faults is None else args.faults
    moments = random.uniform(1, args.steps, count)
    first = random.integers(len(SIGNALS))
    return [
        Fault(int(moment), SIGNALS[(first + i) % len(SIGNALS)], random.integers(PROCESSES))
        for i, moment in enumerate(np.sort(moments))
    ]


class Week:
    """A run through the launcher, to which faults happen."""

    def __init__(self, directory: Path, faults: list[Fault], args: argparse.Namespace):
        self.directory = directory
        self.log = directory.with_suffix(".log")
        self.faults = faults
        self.rows: list[dict[str, float]] = []  # also those that a restart takes back
        train = [__file__, "--run-dir", str(directory), "--train.steps", str(args.steps)]
        train += ["--train.checkpoint-every", str(4 if faults else args.steps)]
        command = [sys.executable, str(PROJECT / "launch" / "local.py"), "--patience", "10"]
        command += ["--processes", str(PROCESSES), "--restarts", str(len(faults) + 2), "--", *train]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "XLA_FLAGS": ""}  # one device a process
        log = self.log.open("w")
        with log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as launcher:
            self._launcher = launcher
            self._follow()
        self._look()
        self.exit_code = self._launcher.returncode

    @property
    def restarts(self) -> int:
        return self.log.read_text().count(": starting again")

    def _follow(self) -> None:
        logged = 0
        for number, fault in enumerate(self.faults, 1):
            if not self._reaches(rows=max(fault.at, logged + 1)):
                return
            fault.time = time.time()
            fault.step = int(self.rows[-1]["step"])
            self._strike(fault)
            if self._reaches(restarts=number):
                self._look()  # the last rows of the start before
                fault.logged = logged = len(self.rows)
        self._reaches(rows=sys.maxsize)

    def _reaches(self, rows: int = 0, restarts: int = 0) -> bool:
        """Waits for so many; False if the run ends before."""
        while self._launcher.poll() is None:
            if len(self.rows) >= rows and self.restarts >= restarts:
                return True
            self._look()
            time.sleep(0.05)
        return False

    def _look(self) -> None:
        """Takes in the rows that are new in the log."""
        latest = self.rows[-1]["time"] if self.rows else 0.0
        self.rows += [row for row in read_metrics(self.directory) if row["time"] > latest]

    def _strike(self, fault: Fault) -> None:
        family = Path(f"/proc/{self._launcher.pid}/task/{self._launcher.pid}/children")
        with contextlib.suppress(OSError, IndexError):  # the run has just come to its end
            os.kill(int(family.read_text().split()[fault.process]), fault.signal)


def problems(week: Week, calm: Week, steps: int) -> list[str]:
    """What was lost, repeated or changed."""
    found = [f"{w.log}: exit code {w.exit_code}" for w in (week, calm) if w.exit_code]
    logged = [row["step"] for row in read_metrics(week.directory)]
    if logged != list(range(1, steps + 1)):
        found.append(f"the log must have steps 1 to {steps}, each once; it has {logged}")
    for fault in week.faults:
        if fault.logged is None and fault.at < steps - 10:
            found.append(f"{fault.signal.name} at step {fault.step} did not stop the run")
    expected = {row["step"]: row for row in calm.rows}
    for row in week.rows:
        right = expected.get(row["step"], {})
        for name in ("loss", "text_loss", "image_loss"):
            if not np.isclose(row[name], right.get(name, np.nan), rtol=1e-5, atol=0):
                found.append(f"step {row['step']}: {name} {row[name]}, not {right.get(name)}")
    return found


def report(week: Week, args: argparse.Namespace) -> None:
    account = json.loads((week.directory / "goodput.json").read_text())
    shares = ", ".join(f"{name} {x:.0%}" for name, x in account["shares"].items() if x >= 0.005)
    hour = HOURS / args.steps  # of a step
    repeated = len(week.rows) - args.steps
    down = week.restarts * args.restart_minutes / 60
    print(f"faults    {len(week.faults)}; {RATE * args.chips * HOURS:.1f} expected")
    for fault in week.faults:
        after = "the run was over"
        if fault.logged is not None and fault.logged < len(week.rows):
            row = week.rows[fault.logged]
            after = f"on from {row['step'] - 1} after {row['time'] - fault.time:.0f} s"
        print(f"          hour {fault.at * hour:.1f}: {fault.signal.name} to process", end=" ")
        print(f"{fault.process} at step {fault.step}, {after}")
    print(f"restarts  {week.restarts}; goodput.json counts {account['starts']} starts")
    print(f"steps     {args.steps}, each in the log once; {repeated} repeated; losses agree")
    print(f"goodput   {account['goodput']:.1%} of these minutes ({shares})")
    print(f"          {HOURS / (HOURS + repeated * hour + down):.1%} of a week", end=" ")
    print(f"({repeated * hour:.1f} h of steps repeated, {down:.1f} h of restarts, as assumed)")


def main() -> int:
    args = arguments()
    place = Path(tempfile.mkdtemp(prefix="week-"))
    week = Week(place / "week", draw(args), args)
    calm = Week(place / "calm", [], args)
    if found := problems(week, calm, args.steps):
        print(*found[:20], f"{len(found)} problems; see {place}", sep="\n")
        return 1
    report(week, args)
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
