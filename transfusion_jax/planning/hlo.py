"""Parses compiled HLO: computations of instructions, with their arrays, operands and attributes.

The text is that of `jax.stages.Compiled.as_text()`. It is scheduled: what an instruction uses is
above it, and what a computation calls is above the computation. It is partitioned: shapes are those
of one device.
"""

import functools
import math
import re
from dataclasses import dataclass

COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) \(.*\{")
# The operation is the first lower-case word between a space and a parenthesis; shapes have none.
INSTRUCTION = re.compile(
    r"  (ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9-]*?)(-start|-update|-done)?\(([^)]*)\)(.*)"
)
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
NAME = re.compile(r"%([\w.-]+)")
CONTINUED = re.compile(r'\n(?="|}})')
"""Metadata of a kernel may begin new lines inside an instruction."""


@dataclass(frozen=True)
class Array:
    dtype: str
    dims: tuple[int, ...]
    space: int
    """0 is main memory; others are on the chip or on the host."""

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)  # token and opaque have none
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0
        return math.prod(self.dims) * width / 8

    @property
    def hbm_bytes(self) -> float:
        return 0.0 if self.space else self.bytes


@dataclass(frozen=True)
class Instruction:
    """`%name = result operation-phase(operands), attributes`."""

    name: str
    operation: str
    """Without the phase of an asynchronous one."""
    phase: str
    """"-start", "-update", "-done" or "" (synchronous)."""
    result: tuple[Array, ...]
    """What it computes, flattened; for a start, what its done will return."""
    operands: tuple[str, ...]
    literal: str
    """The text between the parentheses."""
    attributes: str

    def attribute(self, name: str) -> str:
        """The value of an attribute, up to the next comma outside braces; "" if absent."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|\"[^\"]*\"|[^,\s]*)", self.attributes)
        return found[1].strip('"') if found else ""

    def calls(self, *attributes: str) -> tuple[str, ...]:
        """The computations that these attributes name."""
        return tuple(
            name for attribute in attributes for name in NAME.findall(self.attribute(attribute))
        )


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction
    fused: bool
    """Whether it is the body of a fusion."""

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction, its users and the operand position at which they use it."""
        users = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                users[name].append((instruction, position))
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {
            int(x.literal): x.name for x in self.instructions.values() if x.operation == "parameter"
        }


Computations = dict[str, Computation]
"""By name; the last one is the entry."""


def parse(text: str) -> Computations:
    """The computations of a program's text."""
    parsed: list[tuple[str, dict[str, Instruction], str]] = []
    name = ""
    instructions = {}
    root = ""
    for line in CONTINUED.sub(" ", text).splitlines():
        if header := COMPUTATION.fullmatch(line):
            name = header[2]
            instructions = {}
        elif found := INSTRUCTION.fullmatch(line):
            instructions[found[2]] = read_instruction(found, instructions)
            root = found[2] if found[1] else root
        elif line.startswith("}"):
            parsed.append((name, instructions, root))
    fusions = (
        x for _, instructions, _ in parsed for x in instructions.values() if x.operation == "fusion"
    )
    fused = {name for fusion in fusions for name in fusion.calls("calls")}
    return {
        name: Computation(name, instructions, instructions[root], name in fused)
        for name, instructions, root in parsed
    }


def read_instruction(found: re.Match, above: dict[str, Instruction]) -> Instruction:
    _, name, shape, operation, phase, literal, attributes = found.groups(default="")
    operands = tuple(NAME.findall(literal))
    result = read_arrays(shape)
    if phase == "-start":
        # (operands, result, context), except that copies have (result, operand, context).
        given = sum(len(above[operand].result) for operand in operands)
        result = result[:1] if operation == "copy" else result[given:] or result
    return Instruction(name, operation, phase, result, operands, literal, attributes)


@functools.cache
def read_arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), int(space or 0))
        for dtype, dims, space in ARRAY.findall(shape)
    )
