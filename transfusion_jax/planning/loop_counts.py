"""How often each computation of a compiled program runs.

A loop's count is written beside it (on a CPU) or follows from a counter of its state: where it
starts, what the body adds, and what the condition compares it with.
"""

import math
import re

from transfusion_jax.planning.hlo import Computation, Computations, Instruction

# The operations that run other computations, and the attributes that name those. Reducers are part
# of their operation.
CALLING = {
    "fusion": ("calls",),
    "call": ("to_apply", "calls"),
    "async": ("calls", "called_computations"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "while": ("body", "condition"),
}
SAME = {"copy", "bitcast", "convert", "reshape"}  # of a scalar

# A scalar of a loop: element `index` of its state plus a number, or a number alone (index None).
Scalar = tuple[int | None, int]


def run_counts(program: Computations, unknown_trips: float) -> dict[str, float]:
    """By name. Every branch of a conditional counts as taken; a loop of unknown length runs
    `unknown_trips` times."""
    times = dict.fromkeys(program, 0.0)
    *_, entry = program
    times[entry] = 1.0
    for caller in reversed(program.values()):  # a computation stands below all that it calls
        for instruction in caller.instructions.values():
            if instruction.operation in CALLING and instruction.phase in ("", "-start"):
                count = (
                    trips(instruction, caller, program) if instruction.operation == "while" else 1
                )
                for name in instruction.calls(*CALLING[instruction.operation]):
                    times[name] += times[caller.name] * (unknown_trips if count is None else count)
    return times


def trips(loop: Instruction, caller: Computation, program: Computations) -> int | None:
    """How often the body runs, or None where that depends on data."""
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
    """Both sides of the `<` that a condition, or a fusion of it, ends in."""
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
    """An element of a tuple that is made in this computation."""
    made = computation.instructions[name]
    return scalar(computation, made.operands[index], program) if made.operation == "tuple" else None


def scalar(
    computation: Computation,
    name: str,
    program: Computations,
    arguments: tuple[Scalar | None, ...] = (),
) -> Scalar | None:
    """What a scalar of a loop is, if it is that simple; the arguments are those of a fusion."""
    made = computation.instructions[name]
    if made.operation == "parameter":
        return arguments[int(made.literal)] if arguments else None
    if made.operation == "constant":
        return (None, int(made.literal)) if re.fullmatch(r"-?\d+", made.literal) else None
    if made.operation == "get-tuple-element":
        state = computation.instructions[made.operands[0]]
        return (int(made.attribute("index")), 0) if state.operation == "parameter" else None
    if made.operation not in SAME | {"add", "fusion"}:
        return None
    values = tuple(scalar(computation, operand, program, arguments) for operand in made.operands)
    if made.operation == "fusion":
        called = program[made.calls("calls")[0]]
        return scalar(called, called.root.name, program, values)
    if None in values:
        return None
    if made.operation in SAME:
        return values[0]
    (left, a), (right, b) = values
    return None if None not in (left, right) else (right if left is None else left, a + b)
