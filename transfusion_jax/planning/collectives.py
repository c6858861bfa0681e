"""What devices send each other: the collectives of a compiled program, each with its size and one
group of devices."""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from transfusion_jax.planning.hlo import Computation, Instruction

# Bytes that one of n devices sends per byte of its operands, if it sends as little as can be.
SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclass(frozen=True)
class Collective:
    kind: str  # one of SENT
    bytes_sent: float  # by one device each time, at the least
    times: float  # in one run of the program
    group: tuple[
        int, ...
    ]  # devices, as their places in the mesh: the first group, or the first (source, target)
    between_slices: bool = (
        False  # over the network, each device with those of its place in other slices
    )


def continues(instruction: Instruction, computation: Computation) -> bool:
    """Whether this collective goes on with one that another fusion has started.

    A TPU runs a collective beside its computations in steps, and the text repeats it in the fusion
    that starts it, in those beside which it runs, which hand it on together with its operands, and
    in the one that ends it.
    """
    return computation.fused and any(
        user.attribute("custom_call_target") == "AsyncCollectiveDone"
        or (user.operation == "tuple" and set(instruction.operands) <= set(user.operands))
        for user, _ in computation.users[instruction.name]
    )


def read_collective(
    instruction: Instruction, computation: Computation, times: float
) -> Collective | None:
    """Or None, if it is none or was started elsewhere."""
    kind = instruction.operation
    if kind == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
        return read_transfer(instruction, computation, times)
    if (
        kind not in SENT
        or instruction.phase not in ("", "-start")
        or continues(instruction, computation)
    ):
        return None
    if kind == "all-reduce" and computation.name.startswith(
        "all-reduce-scatter"
    ):  # what XLA calls such a fusion
        kind = "reduce-scatter"
    group = first_group(instruction)
    operands = (
        array for name in instruction.operands for array in computation.instructions[name].result
    )
    return Collective(
        kind, SENT[kind](len(group)) * sum(array.bytes for array in operands), times, group
    )


def read_transfer(send: Instruction, computation: Computation, times: float) -> Collective:
    """A collective between slices: TPUs hand its operand to their host, and a `recv` brings what
    comes of it."""
    kind = send.attribute("_xla_megascale_transfer_type").lower().replace("_", "-")
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', send.attributes)[1]
    ends = [integers(part) for part in slices.split(",")]  # each a slice, or first:last
    count = sum(part[-1] - part[0] + 1 for part in ends)
    size = sum(array.bytes for array in computation.instructions[send.operands[0]].result)
    return Collective(kind, SENT[kind](count) * size, times, (), between_slices=True)


def first_group(instruction: Instruction) -> tuple[int, ...]:
    """Groups are listed, counted (`[2,4]<=[8]`) or axes of a mesh (`mesh['a'=2,'b'=4] {'b'}`)."""
    text = instruction.attributes
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", text):
        return integers(listed[1])
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+?),? ", text + " "):
        return tuple(device_order(counted[2])[: int(counted[1])])
    if mesh := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\S*)\))? \{(.*?)\}", text
    ):
        return mesh_group(*mesh.groups(default=""))
    raise RuntimeError(f"cannot read the groups of {instruction.name}: {text[:200]}")


def mesh_group(axes: str, order: str, names: str) -> tuple[int, ...]:
    """The devices at the first place of all axes but the named ones, which may be parts of axes,
    `'a':(before)size`."""
    sizes = {name: int(size) for name, size in re.findall(r"([\w.]+)'?=(\d+)", axes)}
    devices = device_order(order) if order else range(math.prod(sizes.values()))
    strides = {name: math.prod(list(sizes.values())[i + 1 :]) for i, name in enumerate(sizes)}
    places = []
    for name, before, size in re.findall(r"([\w.]+)'?(?::\((\d+)\)(\d+))?", names):
        size = int(size or sizes[name])
        stride = strides[name] * sizes[name] // (int(before or 1) * size)
        places.append(range(0, size * stride, stride))
    return tuple(devices[sum(place)] for place in itertools.product(*places))


def device_order(text: str) -> list[int]:
    """`[2,4]T(1,0)` counts devices in this shape and transposes it; otherwise they are listed."""
    if not text.startswith("["):
        return list(integers(text))
    shape, axes = (integers(part) for part in text.partition("T")[::2])
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes or None).ravel().tolist()


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
