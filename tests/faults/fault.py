"""A planted fault: one small change of the package that some test must see."""

import importlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "transfusion_jax"
LISTS = ("attention", "autoencoder", "data", "diffusion", "evaluation", "families", "generation",
         "instruments", "llama", "model", "planning", "preflight", "preparation", "processes",
         "safetensors", "stablehlo", "sweeps", "training")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Replaces `old`, which occurs once in `file`, by `new`."""

    name: str
    file: str
    """Path under the package."""
    old: str
    new: str
    tests: str
    """The nearest tests, which run first: names of files without `test_` and `.py`, or of one test
    as in `update::test_every_step_and_seed_draws_anew`."""

    def planted(self, text: str) -> str:
        """The text of the file with the fault in it.

        Raises:
          ValueError: the place is not there, or there are several.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.file} holds {text.count(self.old)} times {self.old!r}"
            )
        return text.replace(self.old, self.new)

    def nearest(self) -> list[str]:
        """The nearest tests as pytest names them."""
        named = (name.partition("::") for name in self.tests.split())
        return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in named]


def faults_by_list() -> dict[str, tuple[Fault, ...]]:
    """All faults, by the name of their list."""
    return {name: importlib.import_module(f"faults.{name}").FAULTS for name in LISTS}


def all_faults() -> list[Fault]:
    """All faults, list by list."""
    return [fault for faults in faults_by_list().values() for fault in faults]
