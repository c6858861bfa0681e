"""Blocks visited by the TPU attention kernel against those needed, and its memory against dense.

    JAX_PLATFORMS=cpu python benchmarks/attention_blocks.py

Rows come from the `synthetic` source (web-like lengths, images of 256 patches) through the pipeline
of training. A pair of a query block and a key block is needed if some query in it sees some key,
found from the whole mask. Of the pairs that the kernel visits it computes some; the others only
write zeros. The last column is the share of computed scores that are not masked.

Memory is what the compiler says for forward and backward on one chip, beside arguments and results.
It is compiled for a TPU topology that you need not have, with libtpu.
"""

import argparse
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from transfusion_jax.config import DataConfig, Experiment, MeshConfig
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.model.attention.attention import attention
from transfusion_jax.model.attention.block_pairs import VISIBLE, block_pairs, visible_blocks
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.parallel.rules import batch_sharding
from transfusion_jax.planning.topology import find_topology


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    if any(args.length % block for block in args.blocks):
        parser.error(f"--blocks {args.blocks} must divide --length {args.length}")
    return args


def packed(length: int, rows: int) -> Intervals:
    """Intervals of the first rows of an epoch."""
    experiment = Experiment(
        name="benchmark", data=DataConfig(row_length=length, batch_rows=rows, prefetch=1)
    )
    batches = read(Data(experiment, train_tokenizer(["synthetic text"], 300)).batches(), 0, 1)
    return row_intervals(jax.tree.map(jnp.asarray, next(batches)), experiment.image.patches)


def needed(intervals: Intervals, block: int) -> int:
    """Pairs of blocks in which some query sees some key, from the mask of every position."""
    starts = np.asarray(intervals.k_start_BL)
    ends = np.asarray(intervals.k_end_BL)
    length = starts.shape[1]
    key = np.arange(length)
    count = 0
    for start, end in zip(starts, ends, strict=True):
        seen = (key >= start[:, None]) & (key < end[:, None])
        blocks = seen.reshape(length // block, block, length // block, block)
        count += int(blocks.any((1, 3)).sum())
    return count


def print_blocks(intervals: Intervals, block: int) -> None:
    rows, length = intervals.k_start_BL.shape
    table = visible_blocks(intervals.k_start_BL, intervals.k_end_BL, block, block, length // block)
    least = needed(intervals, block)
    seen = float((intervals.k_end_BL - intervals.k_start_BL).sum())
    for by in ("query", "key"):
        (_, _, _, flags), count = block_pairs(*table, by=by)
        computed = int((flags[:count] & VISIBLE != 0).sum())
        print(
            f"{block:5}  {by:5}  {least / rows:8.1f}"
            f"  {computed / least:8.3f}  {int(count) / least:8.3f}"
            f"  {computed / table[0].size:7.1%}  {seen / (computed * block * block):7.1%}"
        )


def temporaries(args: argparse.Namespace, implementation: str, block: int) -> float:
    """MiB that the gradients of one row take on a chip, beside arguments and results."""
    devices = find_topology(args.topology).devices
    mesh = make_mesh(MeshConfig(), list(devices))

    def loss(q, k, v, intervals):
        out = attention(q, k, v, intervals, implementation=implementation, block=block)
        return out.astype(jnp.float32).sum()

    def abstract(*sizes, dtype=jnp.bfloat16):
        shape = (len(devices), args.length, *sizes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    q = abstract(args.heads, args.head_dim)
    k = abstract(args.kv_heads, args.head_dim)
    bound = abstract(dtype=jnp.int32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, Intervals(bound, bound))
        compiled = lowered.compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    args = arguments()
    intervals = packed(args.length, args.rows)
    print(f"{args.rows} rows of {args.length} positions")
    print("needed: pairs of blocks per row; computed and visited: relative to needed;")
    print("of all: share of all pairs that is computed; seen: share of computed scores not masked")
    print("block  by      needed  computed   visited   of all     seen")
    for block in args.blocks:
        print_blocks(intervals, block)
    if importlib.util.find_spec("libtpu") is None:
        print("memory: not measured; compiling for TPU needs libtpu (pip install '.[tpu]')")
        return
    print(
        f"temporaries of forward and backward: one row on a chip of {args.topology}, "
        f"{args.heads} heads of {args.head_dim} ({args.kv_heads} for keys), bfloat16"
    )
    for implementation in ("pallas", "chunked", "dense"):
        print(f"{implementation:8} {temporaries(args, implementation, args.blocks[-1]):10.1f} MiB")


if __name__ == "__main__":
    main()
