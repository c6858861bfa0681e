"""Our own safetensors, checked and written anew: what `export --format safetensors` wrote, wherever
it has been in between."""

import json
from pathlib import Path

from transfusion_jax.config import Experiment
from transfusion_jax.config.fields import flat
from transfusion_jax.config.stored import loads
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.export.safetensors import special_tokens
from transfusion_jax.export.shards import Described, write_shards
from transfusion_jax.files import write_atomic
from transfusion_jax.model.published import model_config, tensors
from transfusion_jax.tensors import check_shapes, finite, open_tensors
from transfusion_jax.training.checkpoint import Report

EXPERIMENT = "experiment.json"
BESIDE = ("config.json", "generation_config.json", "tokenizer.model")


def read(source: Path, out: Path, report: Report) -> None:
    """Fills the directory `out` with weights that `train.initial` starts a run from.

    Raises:
      ValueError: `source` is no such export, a file is missing or damaged, tensors, config.json or
        tokenizer are not those of its settings, or a number is not finite.
    """
    found = open_tensors(source)
    for name in (EXPERIMENT, *BESIDE):
        require(
            (source / name).is_file(),
            f"{source} is no export of transfusion_jax in the format safetensors: it has no {name}",
        )
    text = (source / EXPERIMENT).read_text(errors="replace")
    experiment = loads(text, str(source / EXPERIMENT), report=report)
    expected = {tensor.name: tensor.published_shape for tensor in tensors(experiment)}
    check_shapes(
        expected,
        {name: tensor.shape for name, tensor in found.items()},
        f"the tensors in {source} do not fit its {EXPERIMENT}",
    )
    _check_config(source, experiment)
    planned = {name: Described(shape, found[name].dtype) for name, shape in expected.items()}
    write_shards(out, planned, ((name, finite(name, found[name])) for name in planned))
    for name in (EXPERIMENT, *BESIDE):
        write_atomic(out / name, (source / name).read_bytes())


def _check_config(source: Path, experiment: Experiment) -> None:
    """Raises ValueError if config.json says something else of the model or its tokenizer than the
    other files do."""
    file = source / "config.json"
    tokenizer = Tokenizer((source / "tokenizer.model").read_bytes(), f"{source}/tokenizer.model")
    ours = model_config(experiment) | special_tokens(tokenizer)
    try:
        stored = json.loads(file.read_text())
        require(isinstance(stored, dict), "not a JSON object")
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    theirs = flat(stored)
    wrong = [f"it has no {name}" for name in ours if name not in stored] + [
        f"{name} is {theirs[name]!r}, not {value!r}"
        for name, value in flat(ours).items()
        if theirs.get(name, value) != value
    ]
    require(
        not wrong,
        f"{file} is not of the model and tokenizer beside it: {'; '.join(wrong[:3])}",
    )
