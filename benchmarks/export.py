"""What leaving and entering take of the host's memory, and how long.

    python benchmarks/export.py --size 0.37B --devices 8

Random weights of one of the paper's sizes go into a checkpoint, as a run on so many devices leaves
it. Then processes of their own export them and import the export. Memory is the most private
memory (RssAnon, read every few milliseconds), in which pages of mapped files are not. The least
that fits is the code, one array of the checkpoint, and one chunk of it, encoded and decoded.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from transfusion_jax.config import MeshConfig, paper
from transfusion_jax.config.stored import dumps
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.model.build import abstract_model
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import parameter_shardings
from transfusion_jax.training.checkpoint import checksum

EVERY = 0.003  # seconds between two looks at a process
GIB = 2**30
IDLE = "import transfusion_jax.export.safetensors, transfusion_jax.export.from_safetensors"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="0.37B", help="of the paper's Table 2")
    parser.add_argument("--devices", type=int, default=8, help="that the checkpoint is cut over")
    parser.add_argument("--dtype", default="bfloat16", help="of the export")
    parser.add_argument("--work", type=Path, help="where files go (default: a temporary one)")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_run(path: Path, args: argparse.Namespace) -> None:
    """A run directory with one checkpoint that has an average alone."""
    jax.config.update("jax_num_cpu_devices", args.devices)
    experiment = paper(args.size)
    rng = np.random.default_rng(0)
    _, abstract = abstract_model(experiment)
    shardings = parameter_shardings(abstract, make_mesh(MeshConfig(data=1, fsdp=args.devices)))
    drawn = jax.tree.map(
        lambda x, placed: jax.device_put(rng.standard_normal(x.shape, np.float32), placed),
        nnx.to_pure_dict(abstract),
        shardings,
    )
    path.mkdir()
    (path / "config.json").write_text(dumps(experiment))
    (path / "tokenizer.model").write_bytes(train_tokenizer(["a b c"] * 9, 270).model)
    progress = {"train_seconds": 0.0, "data": [], "checksum": {"ema": int(checksum(drawn))}}
    place = (path / "checkpoints" / "1").absolute()
    ocp.save_checkpointables(place, {"ema": drawn, "progress": progress})
    leaves = jax.tree.leaves(drawn)
    largest = max(leaves, key=lambda x: x.nbytes)
    chunk = largest.sharding.shard_shape(largest.shape)
    count, sizes = sum(x.size for x in leaves), (largest.nbytes / GIB, 4 * np.prod(chunk) / GIB)
    print(f"{args.size}: {count:,} parameters")
    print("the largest array takes {:.3f} GiB, in chunks of {:.3f}".format(*sizes))


def measured(*words: str) -> tuple[float, float]:
    """The most private memory of a Python process in GiB, and its seconds."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            line = next(line for line in status if line.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(EVERY)
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    return peak / GIB, time.perf_counter() - began


def main() -> None:
    args = arguments()
    if args.make:
        make_run(args.make, args)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        run, out, back = (str(Path(folder) / name) for name in ("run", "out", "back"))
        made = [__file__, "--make", run, "--size", args.size, "--devices", str(args.devices)]
        subprocess.run([sys.executable, *made], check=True)
        idle, _ = measured("-c", IDLE)
        command = ("-m", "transfusion_jax")
        flags = ("--format", "safetensors", "--dtype", args.dtype, "--out", out)
        for name, words in {
            "export": ("export", run, *flags),
            "import": ("import", "safetensors", out, "--out", back),
        }.items():
            peak, seconds = measured(*command, *words)
            print(f"{name}: {peak:.2f} GiB, {seconds:.0f} s")
        print(f"the code of both takes {idle:.2f} GiB")


if __name__ == "__main__":
    main()
