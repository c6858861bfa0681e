"""Speed and memory of the real training step, against this machine's own matrix-product rate.

    python benchmarks/train_step.py --width 512 --layers 8 --length 1024 --batch 4

Rows come from the `synthetic` source (web-like lengths, images of 256 patches that are half of the
positions) through the same pipeline as in training. Model FLOPs are those of plans
(`model/work.py`): every matrix product three times, for forward and backward; logits at text
targets only; attention by its intervals; no recomputation.
"""

import argparse
import resource
import time
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from transfusion_jax.config import DataConfig, Experiment, ModelConfig
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.host import keep_freed_memory
from transfusion_jax.model.interface import Model
from transfusion_jax.model.work import batch_work, model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--attention", default="chunked", choices=("chunked", "dense", "pallas", "tokamax")
    )
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--remat", default="full", choices=("none", "minimal", "attention", "full"))
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def product_rate(dtype: str, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of ten."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def step_flops(model: Model, experiment: Experiment, batch) -> float:
    work = batch_work(jax.tree.map(np.asarray, batch), experiment.image.patches)
    return model_flops(model.multiplications(), experiment, work)


@dataclass(frozen=True)
class Measured:
    """Of a number of steps."""

    seconds: np.ndarray
    flops: np.ndarray
    waited: float
    """Seconds in which the device had no batch."""
    compile_seconds: float
    temporaries: int
    """Bytes of one step, by the compiler."""
    parameters: int


def experiment_of(args: argparse.Namespace) -> Experiment:
    return Experiment(
        name="benchmark",
        model=ModelConfig(
            layers=args.layers,
            width=args.width,
            heads=args.width // args.head_dim,
            vocab_size=args.vocab,
            compute_dtype=args.dtype,
            attention=args.attention,
            attention_block=args.block,
            remat=args.remat,
        ),
        data=DataConfig(row_length=args.length, batch_rows=args.batch),
    )


def measure(experiment: Experiment, steps: int) -> Measured:
    mesh = make_mesh(experiment.mesh)
    data = Data(experiment, train_tokenizer(["synthetic text"], 300))
    batches = read(data.batches(), 0, experiment.data.prefetch)
    sharding = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        parameters = plan.abstract.parameters
        model = nnx.merge(plan.graph, parameters)
        state = plan.initialise()
        batch = jax.device_put(next(batches), sharding)
        begin = time.perf_counter()
        step = compiled_step(plan).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - begin
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds = []
        flops = []
        waited = 0.0
        for _ in range(steps):
            begin = time.perf_counter()
            batch = jax.device_put(next(batches), sharding)
            waited += time.perf_counter() - begin
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
            flops.append(step_flops(model, experiment, batch))
    return Measured(
        np.asarray(seconds),
        np.asarray(flops),
        waited,
        compile_seconds,
        step.memory_analysis().temp_size_in_bytes,
        sum(x.size for x in jax.tree.leaves(parameters)),
    )


def main() -> None:
    keep_freed_memory()
    args = arguments()
    before = product_rate(args.dtype)
    got = measure(experiment_of(args), args.steps)
    rate = max(before, product_rate(args.dtype))
    typical = float(np.median(got.seconds))
    achieved = float(np.median(got.flops / got.seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = {
        "model": f"{got.parameters / 1e6:.1f} M parameters, {args.layers} layers of {args.width}, "
        f"{args.dtype}",
        "rows": f"{args.batch} of {args.length} positions, attention {args.attention}, "
        f"remat {args.remat}",
        "tokens/s": f"{args.batch * args.length / typical:,.0f} ({typical:.3f} s a step)",
        "matrix product": f"{rate / 1e9:,.0f} GFLOP/s",
        "model FLOPs": f"{achieved / 1e9:,.0f} GFLOP/s: utilisation {achieved / rate:.1%}",
        "waiting for data": f"{got.waited / got.seconds.sum():.2%}",
        "temporaries": f"{got.temporaries / 2**30:.2f} GiB of one step, by the compiler",
        "peak memory": f"{peak:.2f} GiB of the process",
        "compile": f"{got.compile_seconds:.1f} s",
    }
    for name, value in lines.items():
        print(f"{name:17} {value}")


if __name__ == "__main__":
    main()
