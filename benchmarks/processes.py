"""What two processes of one device cost, against one process of two devices.

    python benchmarks/processes.py

Both train the same rows with mesh.data=2 on the CPU, through the same feed and step. Sums over
devices go between processes by gloo, within a process through its memory. Both stay alive, and one
works while the other waits: the rounds alternate, and the load of the machine meets both alike.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from transfusion_jax.config import DataConfig, Experiment, MeshConfig, ModelConfig, ProcessesConfig
from transfusion_jax.parallel.processes import join
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.run import open_run

DEVICES = 2
TOOK = "took "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--rows", type=int, default=4, help="of the global batch")
    parser.add_argument("--steps", type=int, default=5, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # port, processes, which
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def experiment_of(args: argparse.Namespace) -> Experiment:
    return Experiment(
        name="benchmark",
        model=ModelConfig(
            layers=args.layers,
            width=args.width,
            heads=args.width // 64,
            vocab_size=4096,
            compute_dtype="float32",
            attention_block=128,
        ),
        data=DataConfig(row_length=args.length, batch_rows=args.rows),
        mesh=MeshConfig(data=DEVICES),
    )


def work(args: argparse.Namespace) -> None:
    """One process: takes as many steps as a line asks for, and says how long that took."""
    port, processes, number = map(int, args.worker)
    if processes > 1:
        join(f"127.0.0.1:{port}", processes, number, ProcessesConfig())
    run = open_run(experiment_of(args), args.run_dir, report=lambda line: None)
    sharding = batch_sharding(run.mesh)
    batches = run.feed.read(0, sharding)
    with jax.set_mesh(run.mesh):
        state = run.initialise()
        for line in sys.stdin:
            begin = time.perf_counter()
            for _ in range(int(line)):
                batch = run.feed.on_devices(next(batches), sharding)
                state, metrics = run.step(state, batch)
            jax.block_until_ready(state)
            print(f"{TOOK}{time.perf_counter() - begin} {float(metrics['loss'])}", flush=True)
    run.directory.close()


class Group:
    """The processes of one run, with the same number of devices each."""

    def __init__(self, processes: int, run_dir: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
        command = [sys.executable, *sys.argv, "--run-dir", run_dir, "--worker", str(port)]
        self._workers = [
            subprocess.Popen(
                [*command, str(processes), str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            )
            for number in range(processes)
        ]

    def take(self, steps: int) -> tuple[float, float]:
        """Seconds that the steps took, by the slowest process, and the loss of the last."""
        for worker in self._workers:
            print(steps, file=worker.stdin, flush=True)
        answers = [self._answer(worker) for worker in self._workers]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def _answer(self, worker: subprocess.Popen) -> tuple[float, float]:
        for line in worker.stdout:  # gloo speaks there too
            if line.startswith(TOOK):
                seconds, loss = line.removeprefix(TOOK).split()
                return float(seconds), float(loss)
        raise SystemExit("a process has ended early")

    def close(self) -> None:
        for worker in self._workers:
            worker.stdin.close()
        for worker in self._workers:
            worker.wait()


def measure(args: argparse.Namespace) -> None:
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        one = Group(1, f"{place}/one")
        two = Group(DEVICES, f"{place}/two")
        try:
            losses = [group.take(1)[1] for group in (one, two)]  # compiles
            print(f"{'loss of the first step':27}{losses[0]:8.5f} and {losses[1]:.5f}", flush=True)
            for _ in range(args.rounds):
                rounds.append(
                    [1e3 * group.take(args.steps)[0] / args.steps for group in (one, two)]
                )
                print(f"{'ms a step':27}{rounds[-1][0]:8.1f} and {rounds[-1][1]:.1f}", flush=True)
        finally:
            one.close()
            two.close()
    alone, together = (statistics.median(each) for each in zip(*rounds, strict=True))
    ratios = [b / a for a, b in rounds]
    print(
        f"{'one process of two devices':27}{alone:8.1f} ms a step, median of {args.rounds} rounds"
    )
    print(f"{'two processes of one':27}{together:8.1f}")
    print(
        f"{'ratio':27}{statistics.median(ratios):8.2f}, median of rounds "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    given = arguments()
    if given.worker:
        work(given)
    else:
        measure(given)
