"""TPU generations by the names that Google Cloud gives them, and slices of them."""

import math
import re
from dataclasses import dataclass

from launcher import fail


@dataclass(frozen=True)
class Generation:
    """Names of one generation."""

    accelerator: str
    """GKE's node label cloud.google.com/gke-tpu-accelerator."""
    machine: str
    """Compute Engine's machine type, of four chips."""
    dimensions: int
    vm: str = ""
    """What accelerator types of Cloud TPU VMs begin with; empty: it is not offered there."""
    vm_cores: int = 1
    """What the number in an accelerator type counts for each chip."""
    runtime: str = ""
    """Software version of Cloud TPU VMs."""


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu-4t", 3, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Generation(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 2, "v5litepod", 1, "v2-alpha-tpuv5-lite"
    ),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-4t", 3, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard-4t", 2, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x-standard-4t", 3),
}
CHIPS_OF_A_HOST = 4


@dataclass(frozen=True)
class Slice:
    """One TPU slice."""

    generation: Generation
    layout: str
    """As in 4x4x4."""

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.layout.split("x")))

    @property
    def hosts(self) -> int:
        return self.chips // CHIPS_OF_A_HOST

    @property
    def accelerator_type(self) -> str:
        """As Cloud TPU VMs have it: v5litepod-16, or v5p-128 for 64 chips."""
        return f"{self.generation.vm}-{self.chips * self.generation.vm_cores}"


def find_slice(topology: str) -> Slice:
    """The slice of a topology such as v5p:4x4x4, named as in `transfusion-jax plan`."""
    kind, _, layout = topology.partition(":")
    if kind not in GENERATIONS:
        fail(f"TPU {kind!r} of --topology {topology} is not one of {', '.join(GENERATIONS)}")
    found = Slice(GENERATIONS[kind], layout)
    sizes = r"[1-9]\d*" + r"x[1-9]\d*" * (found.generation.dimensions - 1)
    if not re.fullmatch(sizes, layout) or found.chips % CHIPS_OF_A_HOST:
        example = "v5e:4x4" if found.generation.dimensions == 2 else "v5p:4x4x4"
        fail(
            f"--topology {topology} must name {found.generation.dimensions} dimensions that "
            f"multiply to whole hosts of {CHIPS_OF_A_HOST} chips, as in {example}"
        )
    return found
