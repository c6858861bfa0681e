"""TPU slices: their devices as the compiler sees them, and the links between their chips."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from transfusion_jax.parallel.chips import CHIPS, Chip, count_chips

HOST = 15e9
"""Bytes per second between a chip and its host, one way (PCIe; Austin et al. 2025, "How to Scale
Your Model")."""


# Without these, libtpu asks the metadata server for this machine's TPUs and locks them. The values
# do not matter to a topology that is named.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # besides every AxBxC of multiples of 4


@dataclass(frozen=True)
class Topology:
    """One or more equal slices of TPU chips."""

    name: str
    """As in v5p:4x4x4."""
    slices: int
    chip: Chip
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        return count_chips(self.devices)

    @property
    def devices_per_chip(self) -> int:
        """2 where the compiler sees the halves of a chip as devices with half the memory each."""
        return len(self.devices) // self.chips

    def link_bandwidth(self, group: Sequence[int], order: Sequence[jax.Device]) -> float:
        """Bytes per second that a device can send to a group over links inside a slice, one way.

        Args:
          group: indices into `order`, the devices as the program numbers them.
        """
        coords = list(zip(*(order[i].coords for i in group), strict=True))
        sizes = list(zip(*(device.coords for device in order), strict=True))
        closed = rings(self.name.partition(":")[2], self.chip)
        links = 0
        for along, all_along, ring in zip(coords, sizes, closed, strict=True):
            if (size := len(set(along))) > 1:
                links += 2 if ring and size == len(set(all_along)) else 1
        # The halves of a chip share its links.
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
            f"topology {name!r} is not known; known are {flat} with {', '.join(FLAT)}, "
            f"and {deep} with {', '.join(SMALL)} or multiples of 4 (4x4x4, 4x4x8, ...), "
            "as in v5p:4x4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPU needs libtpu: pip install 'transfusion-jax[tpu]'")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    more = {"num_slices": slices} if slices > 1 else {}
    more["wrap"] = rings(layout, CHIPS[kind])
    if kind == "v4":  # one device a chip, as v4 hosts have it
        more["chip_config_name"] = "megacore"
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the TPU compiler refuses the topology {name}: {error}") from None
    return Topology(name, slices, CHIPS[kind], tuple(description.devices))


def rings(layout: str, chip: Chip) -> tuple[bool, bool, bool]:
    """Which dimensions of a slice are closed to rings. The compiler takes none for closed unless it
    is told, and writes some collectives differently. Cubes of 4x4x4 are closed together."""
    sizes = [int(n) for n in layout.split("x")]
    if chip.torus == 2:
        return (*(size >= chip.ring for size in sizes), False)
    return (all(size % chip.ring == 0 for size in sizes),) * 3


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
