"""What one run of a compiled program does on one device: arithmetic, memory traffic, collectives
and kernels.

XLA's own `cost_analysis()` counts the body of a loop once; this counts every trip.
"""

import re
from collections import Counter
from dataclasses import dataclass

from transfusion_jax.planning.collectives import Collective, read_collective
from transfusion_jax.planning.flops import flops
from transfusion_jax.planning.hlo import Instruction, parse
from transfusion_jax.planning.loop_counts import run_counts
from transfusion_jax.planning.traffic import traffic


@dataclass(frozen=True)
class Program:
    flops: float
    """Of dots and convolutions; not of Pallas kernels, whose insides are opaque."""
    hbm_bytes: float
    """Read from and written to main memory."""
    collectives: tuple[Collective, ...]
    kernels: dict[str, float]
    """How often each Pallas kernel runs, by name."""


def read_program(text: str, unknown_trips: float = 1.0, taken: float = 1.0) -> Program:
    """The work of a program, from `jax.stages.Compiled.as_text()`.

    Each branch of a conditional counts as taken `taken` times; a loop whose trip count depends on
    data counts as `unknown_trips` trips.
    """
    program = parse(text)
    total_flops = 0.0
    hbm_bytes = 0.0
    collectives = []
    kernels = Counter()
    for name, times in run_counts(program, unknown_trips, taken).items():
        if not times:
            continue
        computation = program[name]
        for instruction in computation.instructions.values():
            total_flops += times * flops(instruction, computation)
            if not computation.fused:
                hbm_bytes += times * traffic(instruction, computation, program)
            if collective := read_collective(instruction, computation, times):
                collectives.append(collective)
            if instruction.attribute("custom_call_target") == "tpu_custom_call":
                kernels[kernel_name(instruction)] += times
    return Program(total_flops, hbm_bytes, tuple(collectives), dict(kernels))


def kernel_name(call: Instruction) -> str:
    """The name before `pallas_call` in the path of its operation."""
    found = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call', call.attributes)
    return found[1] if found else call.name
