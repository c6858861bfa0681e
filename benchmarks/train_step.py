"""Speed and memory of the real training step, against this machine's own matrix-product rate.

    python benchmarks/train_step.py --width 512 --layers 8 --length 1024 --batch 4
    python benchmarks/train_step.py --size 0.16B --length 4096 --batch 8 --dtype bfloat16

Rows come from the `synthetic` source (web-like lengths, images of 256 patches that are half of the
positions) through the same pipeline as in training. Model FLOPs are those of plans
(`model/work.py`): every matrix product three times, for forward and backward; logits at text
targets only; attention by its intervals; no recomputation. On a CPU there is a device for every
core, as in `train`.
"""

import argparse
import functools
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transfusion_jax.batch import Batch
from transfusion_jax.config import DataConfig, Experiment, ModelConfig, TrainConfig
from transfusion_jax.config.presets import TABLE_2
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.host import keep_freed_memory, use_every_core
from transfusion_jax.model.attention import attention
from transfusion_jax.model.interface import Model
from transfusion_jax.model.work import batch_work, model_flops
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.pretraining.step import compiled_step


def parser() -> argparse.ArgumentParser:
    """The shapes of the model and its rows, which every peer shares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=tuple(TABLE_2), help="instead of width, layers, head-dim")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", help="adds the figures to this file")
    return parser


def arguments() -> argparse.Namespace:
    ours = parser()
    ours.description = __doc__.splitlines()[0]
    ours.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "chunked", "dense", "pallas", "tokamax"),
    )
    ours.add_argument("--block", type=int, default=128)
    ours.add_argument("--remat", default="full", choices=("none", "minimal", "attention", "full"))
    ours.add_argument("--layer-loop", default="auto", choices=("auto", "scan", "unroll"))
    ours.add_argument("--vocab-chunk", type=int, default=512)
    ours.add_argument(
        "--tokamax-backward", action="store_true", help="its backward pass, which skips no block"
    )
    return ours.parse_args()


def product_rate(dtype: str) -> float:
    """FLOP/s of a square matrix product that fills the device, the best of ten."""
    # Several in one call of an accelerator, so that the call itself does not count.
    size, products = (2048, 1) if jax.default_backend() == "cpu" else (8192, 4)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5
    product = jax.jit(lambda a: functools.reduce(jnp.matmul, [a] * (products + 1)))
    product(a).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return products * 2 * size**3 / min(times)


def step_flops(model: Model, experiment: Experiment, batch) -> float:
    work = batch_work(jax.tree.map(np.asarray, batch), experiment.image.patches)
    return model_flops(model.multiplications(), experiment, work)


@dataclass(frozen=True)
class Measured:
    """Of a number of steps."""

    seconds: np.ndarray
    flops: np.ndarray
    waited: float
    """Seconds of waiting for batches, while the step before ran."""
    compile_seconds: float
    temporaries: int
    """Bytes of one step, by the compiler."""
    parameters: int
    attention: str
    """The implementation that ran."""
    loss: float
    """Of the last step."""


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """Layers, width and heads."""
    given = dict(layers=args.layers, width=args.width, heads=args.width // args.head_dim)
    return TABLE_2[args.size] if args.size else given


def experiment_of(args: argparse.Namespace) -> Experiment:
    return Experiment(
        name="benchmark",
        model=ModelConfig(
            **shape_of(args),
            vocab_size=args.vocab,
            compute_dtype=args.dtype,
            attention=getattr(args, "attention", "auto"),
            attention_block=getattr(args, "block", 128),
            remat=getattr(args, "remat", "none"),
            layer_loop=getattr(args, "layer_loop", "auto"),
        ),
        data=DataConfig(row_length=args.length, batch_rows=args.batch),
        train=TrainConfig(vocab_chunk=getattr(args, "vocab_chunk", 512)),
    )


def rows_of(experiment: Experiment) -> Iterator[Batch]:
    """The batches of a run, in NumPy arrays."""
    data = Data(experiment, train_tokenizer(["synthetic text"], 300))
    return read(data.batches(), 0, experiment.data.prefetch)


def measure(experiment: Experiment, steps: int) -> Measured:
    mesh = make_mesh(experiment.mesh)
    batches = rows_of(experiment)
    sharding = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        state = plan.initialise()
        rows = [next(batches)]
        batch = jax.device_put(rows[0], sharding)
        begin = time.perf_counter()
        step = compiled_step(plan).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - begin
        state, metrics = step(state, batch)
        before = jax.block_until_ready(metrics)
        ends = [time.perf_counter()]
        waited = 0.0
        for _ in range(steps):
            begin = time.perf_counter()
            rows.append(next(batches))
            batch = jax.device_put(rows[-1], sharding)
            waited += time.perf_counter() - begin
            state, metrics = step(state, batch)
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
            before = metrics
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
    model = nnx.merge(plan.graph, plan.abstract.parameters)
    return Measured(
        # Before the second step ends, only the first was waited for, which had ended.
        np.diff(ends)[1:],
        np.asarray([step_flops(model, experiment, row) for row in rows[1:]]),
        waited,
        compile_seconds,
        step.memory_analysis().temp_size_in_bytes,
        plan.parameters,
        plan.experiment.model.attention,
        float(metrics["loss"]),
    )


def peak_memory() -> dict[str, float]:
    """GiB: of the process, and of the device where it says so."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"host": host} if device is None else {"host": host, "device": device / 2**30}


def keep(figures: dict[str, float], path: str | None) -> None:
    """Adds a line with the figures to a file, if one is named."""
    if path:
        with open(path, "a") as file:
            print(json.dumps(figures), file=file)


def main() -> None:
    keep_freed_memory()
    args = arguments()
    use_every_core(args.batch)
    if args.tokamax_backward:
        attention.tokamax_attention = functools.partial(
            attention.tokamax_attention, own_backward=False
        )
    before = product_rate(args.dtype)
    got = measure(experiment_of(args), args.steps)
    rate = max(before, product_rate(args.dtype))
    typical = float(np.median(got.seconds))
    achieved = float(np.median(got.flops / got.seconds))
    peak = peak_memory()
    shape = shape_of(args)
    lines = {
        "model": f"{got.parameters / 1e6:.1f} M parameters, {shape['layers']} layers of "
        f"{shape['width']}, {args.dtype}, on {jax.device_count()} {jax.default_backend()} devices",
        "rows": f"{args.batch} of {args.length} positions, attention {got.attention}, "
        f"remat {args.remat}, logits of {args.vocab_chunk} at a time",
        "tokens/s": f"{args.batch * args.length / typical:,.0f} ({typical:.3f} s a step)",
        "matrix product": f"{rate / 1e9:,.0f} GFLOP/s",
        "model FLOPs": f"{achieved / 1e9:,.0f} GFLOP/s: utilisation {achieved / rate:.1%}",
        "waiting for data": f"{got.waited / got.seconds.sum():.2%}",
        "temporaries": f"{got.temporaries / 2**30:.2f} GiB a device, by the compiler",
        "peak memory": ", ".join(f"{x:.2f} GiB of the {name}" for name, x in peak.items()),
        "compile": f"{got.compile_seconds:.1f} s",
        "loss": f"{got.loss:.4f}",
    }
    for name, value in lines.items():
        print(f"{name:17} {value}", flush=True)
    keep(
        {
            "tokens_per_second": args.batch * args.length / typical,
            "matrix_rate": rate,
            "utilisation": achieved / rate,
            "memory_gib": peak.get("device", peak["host"]),
            "parameters": got.parameters,
            "compile_seconds": got.compile_seconds,
            "loss": got.loss,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
