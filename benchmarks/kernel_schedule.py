"""What the TPU attention kernels ask of a chip, read from the compiler's final schedule of each.

    JAX_PLATFORMS=cpu python benchmarks/kernel_schedule.py --topology v5e:2x2 --head-dim 128
    JAX_PLATFORMS=cpu python benchmarks/kernel_schedule.py --splash --blocks 512x512 1024x1024

libtpu compiles for chips that you need not have, and writes the bundles of instructions of every
kernel: a bundle is what a core issues in one cycle. The code of a pair of blocks is straight, so
its bundles are its cycles, but for two things that hold a core up. A product waits until its matrix
unit has taken the rows of the one before: that is added here, at the published rate (`CORES`). What
comes from HBM is fetched during the steps before, and is not: compare `HBM` below. All numbers are
cycles of one core for one head; a v5p has two cores, which share the heads.

First, for each kernel and block (queries x keys): the cycles of a pair without a mask, of a masked
one, of a step besides, and of the first and last step of a sum; then, for a full pair, the share of
the time in which the matrix units are busy, and which of the other units' slots are fullest. Then,
for rows of the `synthetic` source through the pipeline of training: cycles per row, and what would
bound them alone: `needed`, the products of scores that are not masked, at the published rate;
`products`, those of the pairs computed as this compiler lays them out (a unit of a v6e takes 256
deep products, which heads of 128 fill by half); `vector`, the arithmetic and exponentials of those
pairs if they filled every slot; `HBM`, what the blocks fetched and written take at full bandwidth.

`--splash` does the same for the splash attention that comes with JAX, with a causal mask over the
whole row: it has no bidirectional images unless its mask is a function of the image's places, and
no packing without segment ids. Its `compute` is the keys in one turn of the loop inside a step.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from attention_blocks import packed
from jax.sharding import SingleDeviceSharding

from transfusion_jax.model.attention.block_pairs import (
    FIRST,
    FULL,
    VISIBLE,
    block_pairs,
    visible_blocks,
)
from transfusion_jax.model.attention.intervals import Intervals
from transfusion_jax.model.attention.pallas import pallas_attention
from transfusion_jax.parallel.chips import CHIPS
from transfusion_jax.planning.topology import find_topology


@dataclass(frozen=True)
class Core:
    per_chip: int
    units: int
    """Matrix units."""
    side: int
    """Of a matrix unit."""
    rows: int
    """That a matrix unit takes in a cycle."""

    @property
    def flops(self) -> int:
        """Of a cycle."""
        return 2 * self.units * self.side**2 * self.rows


CORES = {"v5e": Core(1, 4, 128, 1), "v5p": Core(2, 4, 128, 1), "v6e": Core(1, 2, 256, 2)}
"""With clocks of 1.5, 1.75 and 1.75 GHz this is the published peak of the chips."""
MATRIX_SLOTS = {"MXU", "MATMUL", "MATPUSH"}
"""Slots of a bundle for the matrix units, by versions of libtpu."""
PRODUCTS = {"": 2, "_dq": 3, "_dkv": 4, "_dqkv": 5}
"""Products of each kernel, per score, of H multiplications and additions."""
LENGTH = 4096


@dataclass(frozen=True)
class Part:
    """Bundles of a kernel between two marks of its control flow."""

    mark: str
    """LB: the body of a loop begins; PF: a part begins that is jumped over at times."""
    bundles: int
    cycles: int
    """With what products wait for matrix units."""
    busy: float
    """Cycles in which a matrix unit is busy, mean of all."""
    full: dict[str, float]
    """Cycles that a kind of slot is used for, if all of its kind are. Fills and spills are among
    the loads and stores."""


def parts(bundles: str, utilisation: str, core: Core) -> list[Part]:
    """The parts of a kernel, from the two texts that the compiler wrote about it."""
    units, marks = [], []
    for line in bundles.splitlines():
        if found := re.match(r" *(?:0x)?([0-9a-f]+) +(LB|LH|LE|PB|PF|CT)?:", line):
            if found[2]:
                marks.append((len(units), found[2]))
            units.append(re.findall(r"vmatmul\.(\S*)\.mxu(\d)", line))
    lines = utilisation.splitlines()
    at = lines.index("== UTILIZATION:")
    slots = lines[at - 2].split(", ")
    capacity = list(map(int, lines[at - 1].split()))
    used = [list(map(int, x.split())) for x in lines[at + 1 :] if x]
    if len(used) != len(units):
        raise ValueError(f"{len(units)} bundles, and the slots of {len(used)}")
    result = []
    for (begin, mark), (end, _) in pairwise([(0, ""), *marks, (len(units), "")]):
        total = np.sum(used[begin:end], axis=0) / capacity
        products = [
            [(unit, (16 if "bf16" in kind else 8) // core.rows) for kind, unit in bundle]
            for bundle in units[begin:end]
        ]
        busy = sum(time for bundle in products for _, time in bundle) / core.units
        full = dict(zip(slots, map(float, total), strict=True))
        result.append(Part(mark, end - begin, waited(products), busy, full))
    return result


def waited(products: list[list[tuple[str, int]]]) -> int:
    """Cycles of bundles, each with the products (matrix unit, cycles that it is busy) it begins."""
    now, free = 0, Counter()
    for bundle in products:
        now = max([now, *(free[unit] for unit, _ in bundle)])
        for unit, time in bundle:
            free[unit] = now + time
        now += 1
    return max([now, *free.values()])


@dataclass(frozen=True)
class Kernel:
    full: Part
    """A pair in which nothing is masked, or any pair if the kernel knows no difference."""
    masked: Part
    step: int
    """Cycles besides, counting parts that run only where a block changes."""
    first: int
    last: int
    row: int
    """Once for a row."""

    @classmethod
    def of(cls, found: list[Part], bodies: int, rows: bool) -> "Kernel":
        """A kernel whose largest parts are `bodies` for a pair. Before them a sum begins, if that
        is jumped over at times, and after them it ends; so do, further out, sums of `rows`."""
        at = sorted(sorted(range(len(found)), key=lambda i: found[i].bundles)[-bodies:])
        begin, end = found[at[0] - 1], found[at[-1] + 1]
        first = begin.cycles if begin.mark == "PF" else 0
        loop = next(i for i, part in enumerate(found) if part.mark == "LB")
        step = sum(part.cycles for i, part in enumerate(found) if i >= loop and i not in at)
        row = found[at[0] - 2].cycles + found[at[-1] + 2].cycles if rows else 0
        step -= first + end.cycles + row
        return cls(found[at[0]], found[at[-1]], step, first, end.cycles, row)


@dataclass(frozen=True)
class Work:
    """What a kernel does for a row and a head."""

    full: float
    masked: float
    """Pairs."""
    steps: float
    sums: float
    fetched: dict[str, float]
    """Blocks of queries and of keys."""

    @classmethod
    def of(cls, intervals: Intervals, block_q: int, block_k: int, by: str) -> "Work":
        start, end = intervals.k_start_BL, intervals.k_end_BL
        rows, length = start.shape
        table = visible_blocks(start, end, block_q, block_k, length // block_k)
        pairs, count = block_pairs(*table, by=by)
        row, query, key, flags = (np.asarray(x[:count]) for x in pairs)

        def blocks(index):
            return 1 + np.count_nonzero(np.diff(row * length + index))

        full, visible, sums = (np.count_nonzero(flags & bit) for bit in (FULL, VISIBLE, FIRST))
        fetched = {"query": blocks(query) / rows, "key": blocks(key) / rows}
        return cls(full / rows, (visible - full) / rows, count / rows, sums / rows, fetched)

    def cycles(self, kernel: Kernel) -> float:
        ends = (kernel.first + kernel.last) * self.sums
        return (
            self.over_pairs(kernel, lambda part: part.cycles)
            + kernel.step * self.steps
            + ends
            + kernel.row
        )

    def over_pairs(self, kernel: Kernel, of) -> float:
        return self.full * of(kernel.full) + self.masked * of(kernel.masked)

    def bytes(self, name: str, block_q: int, block_k: int, H: int) -> float:
        """To and from HBM: q, o and do, k, v and their gradients in bfloat16, four bytes for each
        of bounds, lse and delta."""
        queries = {"": 4 * H + 12, "_dq": 6 * H + 16}.get(name, 4 * H + 16) * block_q
        keys = (4 if name in ("", "_dq") else 8) * H * block_k
        row = 2 * H * LENGTH if name == "_dqkv" else 0
        return self.fetched["query"] * queries + self.fetched["key"] * keys + row


def compile_here(args: argparse.Namespace) -> None:
    """In a process of its own, whose libtpu writes what it does."""
    sharding = SingleDeviceSharding(find_topology(args.topology).devices[0])
    block_q, block_k, *rest = map(int, args.compile.split("x"))

    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if args.splash:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as s
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        of = {"block_q": block_q, "block_kv": block_k, "block_kv_compute": (*rest, block_k)[0]}
        backward = {f"{name.replace('kv', 'kv_dkv', 1)}": size for name, size in of.items()}
        backward["block_q_dkv"] = backward.pop("block_q")
        dq = {} if args.fused else {"block_q_dq": block_q, "block_kv_dq": block_k}
        attend = s.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * 16),
            block_sizes=s.BlockSizes(**of, **backward, **dq, use_fused_bwd_kernel=args.fused),
            head_shards=1,
            q_seq_shards=1,
        )
        arrays = [abstract(16, LENGTH, args.head_dim)] * 3
    else:

        def attend(q, k, v, start, end):
            intervals = Intervals(start, end)
            return pallas_attention(q, k, v, intervals, block_q=block_q, block_k=block_k)

        bound = abstract(2, LENGTH, dtype=jnp.int32)
        arrays = [abstract(2, LENGTH, 16, args.head_dim)] * 3 + [bound] * 2

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()


def compiled(args: argparse.Namespace, block: str) -> dict[str, Kernel] | str:
    """Forward, dq and dkv by name, or why they do not compile."""
    with tempfile.TemporaryDirectory(prefix="schedule-") as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        run = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--compile", block],
            env={**os.environ, "LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            said = re.findall(r"(?m)^(?:F\d{4}|\S*(?:Error|Exception)).*", run.stderr)
            return said[-1][:200] if said else f"exit code {run.returncode}"
        kernels = {}
        for path in Path(dump).glob("*-final_bundles.txt"):
            name = re.search(
                r"(?:interval_attention|splash_mha)(_dqkv|_dq|_dkv)?\w*(?:\.\d+)?-\d+-final",
                path.name,
            )
            if name:
                (slots,) = Path(dump).glob(
                    re.sub(r"-\d+-final_bundles.txt", "-*-final_hlo-static*", path.name)
                )
                core = CORES[args.topology.partition(":")[0]]
                found = parts(path.read_text(), slots.read_text(), core)
                bodies = 1 if args.splash else 2
                kernels[name[1] or ""] = Kernel.of(found, bodies, name[1] == "_dqkv")
        return {name: kernels[name] for name in PRODUCTS if name in kernels}


def print_kernels(block: str, kernels: dict[str, Kernel]) -> None:
    for name, kernel in kernels.items():
        full = kernel.full
        others = [(slot, x) for slot, x in full.full.items() if slot not in MATRIX_SLOTS]
        slot, cycles = max(others, key=lambda item: item[1])
        print(
            f"{block:13} {name[1:] or 'forward':7} {full.cycles:6} {kernel.masked.cycles:6}"
            f" {kernel.step:5} {kernel.first:5} {kernel.last:5}"
            f"  {full.bundles:6} {full.busy / full.cycles:7.1%}  {slot} {cycles / full.cycles:.0%}"
        )


def print_rows(
    args: argparse.Namespace, what: str, block: str, kernels: dict[str, Kernel], rows: Intervals
) -> None:
    """Cycles of a row and a head, and what bounds them."""
    kind = args.topology.partition(":")[0]
    core, chip = CORES[kind], CHIPS[kind]
    clock = chip.flops / core.flops / core.per_chip
    block_q, block_k = map(int, block.split("x")[:2])
    time, products, vector, transfer = {}, 0.0, 0.0, 0.0
    for name, kernel in kernels.items():
        work = Work.of(rows, block_q, block_k, "query" if name in ("", "_dq") else "key")
        if args.splash:  # knows no full pairs, and steps through all
            steps = (LENGTH // block_q) * (LENGTH // block_k)
            work = replace(work, steps=steps)
        time[name] = work.cycles(kernel)
        products += work.over_pairs(kernel, lambda part: part.busy)
        vector += work.over_pairs(kernel, lambda part: max(part.full["VALU"], part.full["EUP"]))
        transfer += work.bytes(name, block_q, block_k, args.head_dim)
    count = sum(PRODUCTS[name] for name in kernels) + args.fused
    seen = float((rows.k_end_BL - rows.k_start_BL).sum()) / len(rows.k_start_BL)
    needed = 2 * args.head_dim * count * seen / core.flops
    hbm = "-" if args.splash else f"{transfer * clock * core.per_chip / chip.bandwidth:,.0f}"
    total = sum(time.values())
    squares = (work.full + work.masked) * block_q * block_k / 512**2
    print(
        f"{what:7} {block:13} {time['']:9,.0f}  {total - time['']:9,.0f}"
        f" {total:9,.0f}  {needed:9,.0f} {products:9,.0f} {vector:9,.0f} {hbm:>9}"
        f"  {needed / total:6.1%} {total / squares:7,.0f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=[f"{q}x{k}" for q in (256, 512, 1024) for k in (256, 512, 1024)],
        help="queries x keys, and for splash attention x compute",
    )
    parser.add_argument("--splash", action="store_true", help="splash attention instead of ours")
    parser.add_argument("--fused", action="store_true", help="one kernel of splash for gradients")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.topology.partition(":")[0] not in CORES:
        parser.error(f"--topology {args.topology} must be of {', '.join(CORES)}")
    return args


def main() -> None:
    args = arguments()
    if args.compile:
        compile_here(args)
        return
    index = jnp.arange(LENGTH)[None]
    rows = {"causal": Intervals(jnp.zeros_like(index), index + 1)}
    if not args.splash:
        rows["packed"] = packed(LENGTH, args.rows)
    found = {}
    print(f"{args.topology}, heads of {args.head_dim}: cycles of a pair, and besides")
    print("block         kernel    full masked  step first  last  bundles   units  fullest slot")
    for block in args.blocks:
        result = compiled(args, block)
        if isinstance(result, str):
            print(f"{block:13} does not compile: {result}")
        else:
            print_kernels(block, result)
            found[block] = result
        sys.stdout.flush()
    print(f"cycles of a row of {LENGTH:,} and a head, what would bound them, and per 512 x 512")
    print("rows    block           forward  gradients       sum     needed  products", end="")
    print("    vector       HBM  needed per 512")
    for what, intervals in rows.items():
        for block, kernels in found.items():
            print_rows(args, what, block, kernels, intervals)


if __name__ == "__main__":
    main()
