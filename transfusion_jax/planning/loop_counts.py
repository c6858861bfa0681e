"""How often each computation of a compiled program runs.

A loop's trip count is written beside it (on a CPU), or derived from a counter in its state: its
start, the increment in the body, and the bound in the condition.
"""

import math
import re

from transfusion_jax.planning.hlo import Computation, Computations, Instruction

# Operations that run other computations, and the attributes that name these. (A reducer counts as
# part of its operation.)
CALLING = {
    "fusion": ("calls",),
    "call": ("to_apply", "calls"),
    "async": ("calls", "called_computations"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "while": ("body", "condition"),
}
PASS_THROUGH = {"copy", "bitcast", "convert", "reshape"}  # keep the value of a scalar

# A scalar of a loop: element `index` of its state plus a number, or a number alone (index None).
Scalar = tuple[int | None, int]


def run_counts(program: Computations, unknown_trips: float, taken: float = 1.0) -> dict[str, float]:
    """How often each computation runs, by name.

    Every branch of a conditional counts as taken `taken` times; a loop whose trip count depends on
    data counts as `unknown_trips` trips.
    """
    times = dict.fromkeys(program, 0.0)
    *_, entry = program
    times[entry] = 1.0
    for caller in reversed(program.values()):  # a computation stands below all that it calls
        for instruction in caller.instructions.values():
            if instruction.operation in CALLING and instruction.phase in ("", "-start"):
                match instruction.operation:
                    case "while":
                        known = trips(instruction, caller, program)
                        count = unknown_trips if known is None else known
                    case "conditional":
                        count = taken
                    case _:
                        count = 1
                for name in instruction.calls(*CALLING[instruction.operation]):
                    times[name] += times[caller.name] * count
    return times


def trips(loop: Instruction, caller: Computation, program: Computations) -> int | None:
    """How often the body runs; None if that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    (body,), (condition,) = loop.calls("body"), loop.calls("condition")
    match comparison(program[condition], program):
        case (int(index), ahead), (None, limit):
            before = element(caller, loop.operands[0], index, program)
            after = element(program[body], program[body].root.name, index, program)
            match before, after:
                case (None, start), (same, step) if same == index and step > 0:
                    return max(0, math.ceil((limit - ahead - start) / step))
    return None


def comparison(
    computation: Computation, program: Computations, arguments: tuple[Scalar | None, ...] = ()
) -> tuple[Scalar, Scalar] | None:
    """Both sides of the `<` at the root of a condition, seen through a fusion."""
    root = computation.root
    sides = tuple(scalar(computation, name, program, arguments) for name in root.operands)
    if root.operation == "fusion":
        return comparison(program[root.calls("calls")[0]], program, sides)
    if root.operation != "compare" or root.attribute("direction") != "LT" or None in sides:
        return None
    return sides


def element(
    computation: Computation, name: str, index: int, program: Computations
) -> Scalar | None:
    """An element of a tuple built in this computation."""
    made = computation.instructions[name]
    return scalar(computation, made.operands[index], program) if made.operation == "tuple" else None


def scalar(
    computation: Computation,
    name: str,
    program: Computations,
    arguments: tuple[Scalar | None, ...] = (),
) -> Scalar | None:
    """A loop's scalar, if it is as simple as `Scalar`; `arguments` are those of a fusion."""
    made = computation.instructions[name]
    if made.operation == "parameter":
        return arguments[int(made.literal)] if arguments else None
    if made.operation == "constant":
        return (None, int(made.literal)) if re.fullmatch(r"-?\d+", made.literal) else None
    if made.operation == "get-tuple-element":
        state = computation.instructions[made.operands[0]]
        return (int(made.attribute("index")), 0) if state.operation == "parameter" else None
    if made.operation not in PASS_THROUGH | {"add", "fusion"}:
        return None
    values = tuple(scalar(computation, operand, program, arguments) for operand in made.operands)
    if made.operation == "fusion":
        called = program[made.calls("calls")[0]]
        return scalar(called, called.root.name, program, values)
    if None in values:
        return None
    if made.operation in PASS_THROUGH:
        return values[0]
    (left, a), (right, b) = values
    return None if None not in (left, right) else (right if left is None else left, a + b)
