"""Our own safetensors, checked and written anew: what `export --format safetensors` wrote, wherever
it has been in between."""

from pathlib import Path

from transfusion_jax.config.stored import loads
from transfusion_jax.errors import require
from transfusion_jax.export.shards import Described, write_shards
from transfusion_jax.files import write_atomic
from transfusion_jax.model.published import tensors
from transfusion_jax.tensors import check_shapes, finite, open_tensors
from transfusion_jax.training.checkpoint import Report

EXPERIMENT = "experiment.json"
BESIDE = ("config.json", "generation_config.json", "tokenizer.model")


def read(source: Path, out: Path, report: Report) -> None:
    """Fills the directory `out` with weights that `train.initial` starts a run from.

    Raises:
      ValueError: `source` is no such export, a file is missing or damaged, tensors are not those of
        its settings, or a number is not finite.
    """
    found = open_tensors(source)
    for name in (EXPERIMENT, *BESIDE):
        require(
            (source / name).is_file(),
            f"{source} is no export of transfusion_jax in the format safetensors: it has no {name}",
        )
    experiment = loads((source / EXPERIMENT).read_text(), str(source / EXPERIMENT), report=report)
    expected = {tensor.name: tensor.published_shape for tensor in tensors(experiment)}
    check_shapes(
        expected,
        {name: tensor.shape for name, tensor in found.items()},
        f"the tensors in {source} do not fit its {EXPERIMENT}",
    )
    planned = {name: Described(shape, found[name].dtype) for name, shape in expected.items()}
    write_shards(out, planned, ((name, finite(name, found[name])) for name in planned))
    for name in (EXPERIMENT, *BESIDE):
        write_atomic(out / name, (source / name).read_bytes())
