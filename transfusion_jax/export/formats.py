"""The formats that weights leave and enter in; each has a module, imported when it is asked for.

A module of a format to export has

    write(trained: Trained, out: Path, dtype: str, report: Report) -> None

which fills the directory `out`. One that is not of a trained model has its own

    opened(run_dir: Path, step: int | None, weights: Weights, report: Report)

which gives what its `write` is given. A module of a format to import has

    read(source: Path, out: Path, report: Report) -> None

which fills `out` with what `train.initial` starts a run from. Both raise ValueError for what the
user can cause. They run in one process, the one that leads.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfusion_jax.errors import require

PACKAGE = __package__


@dataclass(frozen=True)
class Format:
    help: str
    """One line."""
    module: str
    """Of this package."""
    card: bool = False
    """Its `write` takes a `licence` too, for a model card."""

    def function(self, name: str, default: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """`write`, `opened` or `read` of its module.

        Raises:
          ValueError: it needs a package that is not installed.
        """
        try:
            module = importlib.import_module(f"{PACKAGE}.{self.module}")
            return getattr(module, name, default)
        except ModuleNotFoundError as error:
            require(not str(error.name).startswith(PACKAGE.split(".")[0]), str(error))
            raise ValueError(
                f"this format needs the package {error.name}: pip install 'transfusion-jax[export]'"
            ) from error


FORMATS: Mapping[str, Format] = {
    "safetensors": Format("the whole model, for torch or `train.initial`", "safetensors", True),
    "llama": Format("the text trunk as a LlamaForCausalLM, with its tokenizer", "llama"),
    "gguf": Format("the text trunk as a GGUF file, for llama.cpp", "gguf"),
    "autoencoder": Format("the run's autoencoder as diffusers' AutoencoderKL", "autoencoder"),
    "stablehlo": Format("compiled phases and a runner that needs no package but jax", "stablehlo"),
}
"""By the names of `export --format`."""

IMPORTS: Mapping[str, Format] = {
    "safetensors": Format("what `export --format safetensors` wrote", "from_safetensors"),
    "llama": Format("Llama weights in the layout of Hugging Face or Meta", "from_llama"),
}
"""By the names of `import FORMAT`."""
