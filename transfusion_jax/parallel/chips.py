"""TPU chips: their published rates, and which chip a device is (a part of)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip (Google Cloud's TPU documentation), except `memory`."""

    memory: int
    """Bytes of HBM that the compiler lets a program use."""
    flops: float
    """Per second, bfloat16."""
    bandwidth: float
    """Bytes per second to and from HBM."""
    link: float
    """Bytes per second over one link between neighbours, one way."""
    network: float
    """Bytes per second to another slice, one way: its share of its host's network card."""
    torus: int
    """Dimensions of the slice; each has a link in both directions."""
    ring: int
    """A dimension of at least so many chips is closed to a ring; in three dimensions, if all are
    multiples of it (`planning/topology.py`)."""


CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.228e12, 50e9, 6.25e9, torus=3, ring=4),
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.819e12, 50e9, 3.125e9, torus=2, ring=16),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2.765e12, 100e9, 6.25e9, torus=3, ring=4),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1.638e12, 100e9, 12.5e9, torus=2, ring=16),
    "tpu7x": Chip(int(189.48 * GIB), 2307e12, 7.38e12, 100e9, 12.5e9, torus=3, ring=4),
}
"""By the names of topologies."""
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""The chip by the `device_kind` of a JAX device."""


def count_chips(devices: Sequence[Any]) -> int:
    """How many TPU chips these devices are: the halves of a chip can be devices of their own."""
    return len({(getattr(device, "slice_index", 0), *device.coords) for device in devices})


def peak_flops(devices: Sequence[Any]) -> float | None:
    """What all these devices can do at best in a second, in bfloat16.

    None where the peak of one of them is not known: CPUs, GPUs, chips that are not in `CHIPS`.
    """
    kinds = {DEVICE_KINDS.get(device.device_kind) for device in devices}
    if len(kinds) != 1 or None in kinds:
        return None
    return count_chips(devices) * CHIPS[kinds.pop()].flops
