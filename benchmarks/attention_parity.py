"""Attention's fast kernels against the dense reference, forward and backward, on fresh random rows.

    python benchmarks/attention_parity.py

Rows hold several documents, images of 256 patches and padding, at 1,024 and 4,096 positions; heads
of 64 and 128, with and without sharing of key heads. The reference is `dense` in float32 with
products of the highest precision, on the same rounded inputs. An error is ||out - ref|| / ||ref||
of the output and of each gradient; one that is no number fails. Then the kernels' times on rows of
the `synthetic` source. Off a GPU, tokamax's XLA version stands in and rows are short.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.model.attention.dense import dense_attention
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.tokamax import tokamax_attention
from transfusion_jax.model.attention.triton_backward import Tiles, gradients

LIMITS = {"bfloat16": 1e-2, "float32": 2e-3}
"""Of relative errors: bfloat16 operands give 1e-3 to 1e-2, tensor float 32 about 3e-4."""

SHAPES = ((1024, 4, 1, 64), (4096, 4, 4, 64), (4096, 4, 2, 128))
"""Positions, heads, key heads, head dimension."""


def random_intervals(rng: np.random.Generator, rows: int, length: int, patches: int) -> Intervals:
    """Of rows of documents of random lengths, each with as many images as fit, and padding."""
    start, end = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at, used = 0, length - int(rng.integers(0, length // 8))
        while at < used:
            stop = min(used, at + int(rng.integers(1, length // 2)))
            start[row, at:stop] = at
            end[row, at:stop] = np.arange(at, stop) + 1
            image = at + int(rng.integers(1, 40))
            while image + patches < stop:
                end[row, image : image + patches] = image + patches
                image += patches + int(rng.integers(2, 300))
            at = stop
    return Intervals(jnp.asarray(start), jnp.asarray(end))


def random_arrays(rng, rows, length, heads, kv_heads, head_dim, dtype) -> list[Array]:
    """q, k, v and the gradient of the output."""
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def program(attend):
    """Output and gradients of q, k and v, given that of the output."""

    @jax.jit
    def run(q, k, v, d_out, intervals):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, intervals), q, k, v)
        return out, *backward(d_out)

    return run


@program
def reference(q, k, v, intervals):
    with jax.default_matmul_precision("highest"):
        return dense_attention(q, k, v, intervals)


def relative_error(value: Array, expected: Array) -> float:
    difference = np.asarray(value, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def errors(kernel: str, arrays: list[Array], intervals: Intervals) -> list[float]:
    """Of the output and the gradients of q, k and v."""
    attend = functools.partial(tokamax_attention, implementation=kernel)
    with jax.default_matmul_precision("highest"):
        exact = reference(*(x.astype(jnp.float32) for x in arrays), intervals)
    results = program(attend)(*arrays, intervals)
    return [relative_error(x, y) for x, y in zip(results, exact, strict=True)]


def milliseconds(function, *arrays, repeats: int) -> float:
    """The median time of one call."""
    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


def check(kernels: list[str], on_gpu: bool, seed: int) -> bool:
    """Prints a line for each kernel and shape; whether all are right."""
    rng = np.random.default_rng(seed)
    right = True
    for length, *shape in SHAPES:
        length = length if on_gpu else length // 10
        intervals = random_intervals(rng, 2, length, 256 if on_gpu else 16)
        for kernel in kernels:
            for dtype in ("bfloat16",) if kernel == "mosaic_gpu" else LIMITS:
                arrays = random_arrays(rng, 2, length, *shape, dtype)
                heads, kv_heads, head_dim = shape
                case = f"{kernel:10} {dtype:8} {length:5} {heads}/{kv_heads} heads of {head_dim:3}"
                begin = time.perf_counter()
                try:
                    found = errors(kernel, arrays, intervals)
                except Exception as error:  # the other cases are worth knowing
                    print(f"{case}  failed: {type(error).__name__} {str(error)[:300]}", flush=True)
                    right = False
                    continue
                good = all(x <= LIMITS[dtype] for x in found)
                right &= good
                figures = " ".join(f"{x:.1e}" for x in found)
                seconds = time.perf_counter() - begin
                verdict = "ok" if good else "WRONG"
                print(f"{case}  {figures}  {verdict} ({seconds:.0f} s)", flush=True)
    return right


def timings(kernels: list[str], on_gpu: bool, seed: int) -> None:
    """Prints milliseconds of one layer's attention at the shapes of 0.16B."""
    rng = np.random.default_rng(seed)
    rows, length, heads, patches = (8, 4096, 12, 256) if on_gpu else (1, 128, 2, 16)
    intervals = random_intervals(rng, rows, length, patches)
    arrays = random_arrays(rng, rows, length, heads, heads, 64, "bfloat16")
    for kernel in kernels:
        own = not kernel.endswith("'s own")
        attend = functools.partial(
            tokamax_attention, implementation=kernel.split("/")[0], own_backward=own
        )
        forward = jax.jit(
            lambda q, k, v, d_out, intervals, attend=attend: attend(q, k, v, intervals)
        )
        try:
            one = milliseconds(forward, *arrays, intervals, repeats=20)
            both = milliseconds(program(attend), *arrays, intervals, repeats=20)
        except Exception as error:
            print(f"{kernel:10} failed: {type(error).__name__} {str(error)[:200]}", flush=True)
            continue
        where = f"{rows} rows of {length}, {heads} heads of 64"
        print(f"{kernel:10} {where}: {one:.2f} ms forward, {both:.2f} ms with backward", flush=True)


def tuning(seed: int) -> None:
    """Prints milliseconds of the backward kernels, cut in several ways, at the shapes of 0.16B."""
    rng = np.random.default_rng(seed)
    intervals = random_intervals(rng, 8, 4096, 256)
    arrays = random_arrays(rng, 8, 4096, 12, 12, 64, "bfloat16")
    lse = jnp.ones((8, 12, 4096))  # of the right size: p stays finite
    for tiles in (Tiles(), Tiles(64, 4, 1), Tiles(64, 4, 3), Tiles(64, 8, 2), Tiles(128, 8, 2)):
        run = jax.jit(functools.partial(gradients, tiles=tiles))
        q, k, v, d_out = arrays
        bounds = intervals.k_start_BL, intervals.k_end_BL
        try:
            taken = milliseconds(run, *bounds, q, k, v, d_out, lse, d_out, repeats=20)
            print(f"{tiles}: {taken:.2f} ms backward", flush=True)
        except Exception as error:
            print(f"{tiles} failed: {type(error).__name__} {str(error)[:200]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**32, help="default: the time"
    )
    parser.add_argument("--json", help="adds the verdict to this file")
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    kernels = ["mosaic_gpu", "triton"] if on_gpu else ["xla"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, seed {args.seed}")
    print("errors of the output and of the gradients of q, k, v")
    right = check(kernels, on_gpu, args.seed)
    timings([*kernels, f"{kernels[0]}/tokamax's own"], on_gpu, args.seed)
    if on_gpu:
        tuning(args.seed)
    print(f"parity: {'all right' if right else 'NOT right'}", flush=True)
    if args.json:
        with open(args.json, "a") as file:
            print(json.dumps({"right": right}), file=file)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
