"""A planted fault: one small change of the package that some test must see."""

import importlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "transfusion_jax"
LISTS = ("attention", "autoencoder", "data", "diffusion", "evaluation", "generation", "model",
         "planning", "preparation", "training")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Replaces `old`, which occurs once in `file`, by `new`."""

    name: str
    file: str
    """Path under the package."""
    old: str
    new: str
    tests: str
    """Test files that should see it, without `test_` and `.py`; they run first."""

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


def all_faults() -> list[Fault]:
    modules = [importlib.import_module(f"faults.{name}") for name in LISTS]
    return [fault for module in modules for fault in module.FAULTS]
