"""Bytes that a compiled program reads from and writes to main memory.

Between instructions all arrays are in memory, most of them in main memory; inside a fusion none is.
What is read or written in part counts in part: a loop over layers slices stacked parameters and
updates stacked results in place. A kernel's operands count once, however often it fetches their
blocks, and arrays count without the padding of tiles.
"""

import math

from transfusion_jax.planning.collectives import SENT, continues
from transfusion_jax.planning.hlo import Computation, Computations, Instruction

# They touch no memory, or the instructions that they call do, or it was counted when they started.
FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
    ),
    *("while", "conditional", "call", "async"),
}
FREE_TARGETS = {
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
}
SLICES = {"slice", "dynamic-slice", "gather"}
MOVES = {
    "bitcast",
    "convert",
    "copy",
    "pad",
    "reshape",
    "transpose",
}  # each element of the result from one or none
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # by the operand at this position


def traffic(instruction: Instruction, computation: Computation, program: Computations) -> float:
    """Of an instruction between fusions, by one execution."""
    called = program[instruction.calls("calls")[0]] if instruction.operation == "fusion" else None
    target = (called.root if called else instruction).attribute("custom_call_target")
    if (
        instruction.operation in FREE
        or instruction.phase in ("-update", "-done")
        or target in FREE_TARGETS
    ):
        return 0.0
    if target == "AsyncCollectiveStart":  # its result holds its operands too
        return sum(array.hbm_bytes for array in instruction.result)
    read = 0.0
    for name in set(instruction.operands):
        operand = computation.instructions[name]
        uses = (use for use in computation.users[name] if use[0] is instruction)
        used = sum(elements_read(*use, computation, program) for use in uses)
        read += min(1.0, used / max(1, elements(operand))) * sum(
            array.hbm_bytes for array in operand.result
        )
    made = outputs(called) if called else [instruction]
    made = made * len(instruction.result) if len(made) == 1 else made
    return read + sum(
        min(array.hbm_bytes, bytes_written(output, called or computation))
        for output, array in zip(made, instruction.result, strict=True)
    )


def elements_read(
    user: Instruction, position: int, computation: Computation, program: Computations
) -> int:
    """How much of its operand at this position an instruction reads."""
    if user.operation == "fusion":
        called = program[user.calls("calls")[0]]
        return elements_used(called.parameters[position], called, program)
    if user.operation in SLICES and position == 0:
        return elements(user)
    if position == 0 and updates_in_place(user, computation):
        return elements(update(user, computation)) if user.operation == "scatter" else 0
    return elements(computation.instructions[user.operands[position]])


def elements_used(name: str, called: Computation, program: Computations) -> int:
    """How much of a value the rest of a fusion needs, which computes nothing else; never more than
    all."""
    made, needed = called.instructions[name], 0
    if made in outputs(called):
        return 0 if handed_on(made, called) else elements(made)
    for user, position in called.users[name]:
        if user.operation in MOVES:
            needed += elements_used(user.name, called, program)
        elif user.operation != "tuple" and not goes_on(user, called):
            needed += elements_read(user, position, called, program)
    return min(needed, elements(made))


def bytes_written(output: Instruction, computation: Computation) -> float:
    if handed_on(output, computation):
        return 0.0
    written = update(output, computation) if updates_in_place(output, computation) else output
    return sum(array.bytes for array in written.result)


def outputs(called: Computation) -> list[Instruction]:
    """What a fusion's results are, seen through bitcasts."""
    root = behind(called.root.name, called)
    return [behind(name, called) for name in root.operands] if root.operation == "tuple" else [root]


def behind(name: str, computation: Computation) -> Instruction:
    made = computation.instructions[name]
    return behind(made.operands[0], computation) if made.operation == "bitcast" else made


def updates_in_place(instruction: Instruction, computation: Computation) -> bool:
    """Whether it changes a part of an array that stays where it is: in a fusion, of a parameter
    that is a result."""
    if instruction.operation not in UPDATES or not computation.fused:
        return instruction.operation in UPDATES
    updated = behind(instruction.operands[0], computation)
    return updated.operation == "parameter" and instruction in outputs(computation)


def update(instruction: Instruction, computation: Computation) -> Instruction:
    return computation.instructions[instruction.operands[UPDATES[instruction.operation]]]


def handed_on(output: Instruction, computation: Computation) -> bool:
    """Whether this result belongs to a collective that goes on beside the fusion, which does not
    touch it."""
    beside = any(goes_on(other, computation) for other in computation.instructions.values())
    return goes_on(output, computation) or (beside and output.operation == "parameter")


def goes_on(instruction: Instruction, computation: Computation) -> bool:
    return instruction.operation in SENT and continues(instruction, computation)


def elements(instruction: Instruction) -> int:
    return sum(math.prod(array.dims) for array in instruction.result)
