"""TPU slices: what their chips can do, and their devices for the compiler, none of which need be
there."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

GIB = 2**30
HOST = 15e9
"""Bytes per second between a chip and its host, one way (PCIe; Austin et al. 2025, "How to Scale
Your Model")."""


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip (Google Cloud's TPU documentation), but for `memory`."""

    memory: int
    """Bytes of its HBM that the compiler lets a program have."""
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
    """Chips along a dimension from which on it closes to a ring."""


CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.228e12, 50e9, 6.25e9, torus=3, ring=4),
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.819e12, 50e9, 3.125e9, torus=2, ring=16),
    "v5p": Chip(int(95.73 * GIB), 459e12, 2.765e12, 100e9, 6.25e9, torus=3, ring=4),
    "v6e": Chip(int(31.24 * GIB), 918e12, 1.638e12, 100e9, 12.5e9, torus=2, ring=16),
    "tpu7x": Chip(int(189.48 * GIB), 2307e12, 7.38e12, 100e9, 12.5e9, torus=3, ring=4),
}
# libtpu asks a machine for its TPUs, of which it has none, and locks them. What it is told instead
# does not matter to a topology with a name.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # and every AxBxC of multiples of 4


@dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, equal to each other."""

    name: str
    """As in v5p:4x4x4."""
    slices: int
    chip: Chip
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        return len({(getattr(device, "slice_index", 0), *device.coords) for device in self.devices})

    @property
    def devices_per_chip(self) -> int:
        """2 where the compiler knows the halves of a chip, each with half its memory, as devices of
        their own."""
        return len(self.devices) // self.chips

    def link_bandwidth(self, group: Sequence[int], order: Sequence[jax.Device]) -> float:
        """Bytes per second that a device can send, one way, to the others of a group, over the
        links inside a slice.

        Args:
          group: indices into `order`, the devices as the program numbers them.
        """
        coords = list(zip(*(order[i].coords for i in group), strict=True))
        sizes = list(zip(*(device.coords for device in order), strict=True))
        links = 0
        for along, all_along in zip(coords, sizes, strict=True):
            if (size := len(set(along))) > 1:
                links += 2 if size == len(set(all_along)) >= self.chip.ring else 1
        # The halves of a chip are next to each other.
        return max(links, 1) * self.chip.link / self.devices_per_chip


def find_topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as v5p:4x4x4.

    Raises:
      ValueError: there is no such topology, or no compiler for it.
    """
    kind, _, layout = name.partition(":")
    if slices < 1:
        raise ValueError(f"--slices {slices} must be at least 1")
    if kind not in CHIPS or not _is_layout(layout, CHIPS[kind].torus):
        flat, deep = (
            ", ".join(k for k, chip in CHIPS.items() if chip.torus == torus) for torus in (2, 3)
        )
        raise ValueError(
            f"topology {name!r} is not known; known are {flat} with {', '.join(FLAT)}, and {deep} with "
            f"{', '.join(SMALL)} or multiples of 4 (4x4x4, 4x4x8, ...), as in v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPU needs libtpu: pip install 'transfusion-jax[tpu]'")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    more = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":  # one device a chip, as v4 hosts have it
        more["chip_config_name"] = "megacore"
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler refuses the topology {name}: {error}") from None
    return Topology(name, slices, CHIPS[kind], tuple(description.devices))


def larger(name: str) -> str | None:
    """The next topology of at least twice as many chips; None if there is none."""
    kind, _, layout = name.partition(":")
    ladder = (
        FLAT
        if CHIPS[kind].torus == 2
        else (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
    )
    return next((f"{kind}:{more}" for more in ladder if _chips(more) >= 2 * _chips(layout)), None)


def _chips(layout: str) -> int:
    return math.prod(map(int, layout.split("x")))


def _is_layout(layout: str, torus: int) -> bool:
    if torus == 2:
        return layout in FLAT
    sizes = [int(n) for n in layout.split("x")] if re.fullmatch(r"\d+x\d+x\d+", layout) else []
    return layout in SMALL or (
        bool(sizes) and all(n > 0 and n % 4 == 0 for n in sizes) and max(sizes) <= 32
    )
