"""The model card: what the weights are, what they were trained on, what they reach."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfusion_jax import __version__
from transfusion_jax.config import Experiment
from transfusion_jax.errors import require
from transfusion_jax.export.shards import Described
from transfusion_jax.export.trained import Trained

KINDS = {
    "transfusion": "text predicted token by token, images diffused (arXiv 2408.11039)",
    "chameleon": "text and the codes of images predicted token by token (arXiv 2405.09818)",
    "llama": "text alone (arXiv 2307.09288)",
}

COUNTS = ("documents", "in_rows", "rows")
"""Of `ledger.json`."""


UNKNOWN = "unknown"
"""The licence of a run: it does not know those of its data."""


def check_licence(licence: str) -> None:
    """Raises ValueError for what can be no identifier of a licence."""
    require(
        re.fullmatch(r"[A-Za-z][A-Za-z0-9.+-]*", licence) is not None,
        f"--license {licence!r} is no identifier of a licence, such as apache-2.0 or cc-by-4.0",
    )


def model_card(
    trained: Trained, planned: Mapping[str, Described], dtype: str, licence: str = UNKNOWN
) -> str:
    """README.md in the form of Hugging Face's hub.

    Args:
      licence: SPDX's identifier, which the hub has in lower case.
    """
    experiment = trained.experiment
    family = experiment.model.family
    count = sum(described.nbytes // described.dtype.itemsize for described in planned.values())
    tag = "any-to-any" if experiment.model.images != "none" else "text-generation"
    which = "average of the weights" if trained.weights == "average" else "weights"
    return f"""---
license: {licence.lower()}
library_name: transfusion_jax
pipeline_tag: {tag}
tags: [{family}, safetensors]
---

# {experiment.name}

One transformer of {count:,} parameters: {KINDS[family]}. The {which} after step {trained.step:,}
of {experiment.train.steps:,}, in {dtype}, written by transfusion_jax {__version__}.

## Settings

{_settings(experiment)}

`experiment.json` has all of them, `config.json` those that a reader of the tensors needs.

## Data

{_data(trained.run_dir, experiment)}

## Metrics

{_metrics(trained)}

## Licence

{_licence(licence)} The software that made
them, transfusion_jax, is under Apache-2.0.
"""


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return """\
The run does not say under which licence these weights may be used: whoever publishes them does,
here and at the top of this file, as the licences of the data above allow."""
    return f"""\
Whoever exported these weights put them under {licence}. Whether the licences of the data above
allow that was not checked."""


def _settings(experiment: Experiment) -> str:
    model, image, train = experiment.model, experiment.image, experiment.train
    rows = {
        "layers, width, feed-forward": f"{model.layers}, {model.width}, {model.ffn_width}",
        "heads, of keys and values": f"{model.heads}, {model.num_kv_heads}",
        "vocabulary": f"{model.vocab_size:,} rows",
    }
    if model.images != "none":
        rows["images"] = (
            f"{model.images} {image.height} x {image.width} x {image.channels}, "
            f"{image.patches} positions each"
        )
    if model.images == "latents":
        diffusion = experiment.diffusion
        rows["patches"] = f"{model.patch_encoder}, {image.patch} x {image.patch}"
        rows["diffusion"] = (
            f"{diffusion.schedule}, {diffusion.steps} timesteps, predicts {diffusion.prediction}"
        )
    rows |= {
        "rows of a batch, positions of a row": f"{experiment.data.batch_rows}, "
        f"{experiment.data.row_length:,}",
        "learning rate": f"{experiment.optimizer.learning_rate:g}",
        "seed": str(train.seed),
    }
    if train.initial:
        rows["started from"] = train.initial
    return _table(("setting", "value"), rows.items())


def _data(run_dir: Path, experiment: Experiment) -> str:
    """The sources, and what became of their documents."""
    path, rows = run_dir / "ledger.json", []
    ledger = _stored(path) or {}
    for source in experiment.data.sources:
        counts = ledger.get(source.name, {})
        try:
            documents = [f"{counts[name]:,}" if name in counts else "?" for name in COUNTS]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {source.name} has no counts: {error}") from None
        rows.append((source.name, f"{source.weight:g}", *documents))
    return _table(("source", "weight", *(name.replace("_", " ") for name in COUNTS)), rows)


def _metrics(trained: Trained) -> str:
    """The numbers of `summary.json`, and whether they are of these weights."""
    summary = _stored(trained.run_dir / "summary.json")
    if not summary:
        return "The run has no `summary.json`: nothing was measured at its end."
    rows = [
        (name, f"{value:.6g}" if isinstance(value, float) else f"{value:,}")
        for name, value in summary.items()
        if isinstance(value, int | float)
    ]
    last = summary.get("steps") == trained.step and trained.weights == "average"
    note = "" if last else (
        "These are of the average of the weights at the end of the run, not of the weights here.\n"
    )  # fmt: skip
    return f"{note}\n{_table(('metric', 'value'), rows)}".strip()


def _stored(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file.

    Raises:
      ValueError: it holds something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        require(isinstance(found, dict), "not a JSON object")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
