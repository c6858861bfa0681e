"""Sources by the names that experiments use."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transfusion_jax.config import Experiment
from transfusion_jax.data.sources import comparisons, sums
from transfusion_jax.data.sources.digits import Digits
from transfusion_jax.data.sources.prepared import Prepared
from transfusion_jax.data.sources.scenes.source import Scenes
from transfusion_jax.data.sources.source import Source
from transfusion_jax.data.sources.synthetic import Synthetic
from transfusion_jax.files import local_path

SOURCES: dict[str, Callable[[Experiment, str], Source]] = {
    "comparisons": comparisons.source,
    "digits": Digits,
    "scene_edits": partial(Scenes, edit_share=1.0),
    "scenes": Scenes,
    "sums": sums.source,
    "synthetic": Synthetic,
}


def load_sources(experiment: Experiment, split: str) -> list[Source]:
    """The split "train" or "held_out" of every source of the experiment.

    Raises:
      ValueError: a source is unknown.
    """
    names = [source.name for source in experiment.data.sources]
    for name in names:
        if name not in SOURCES and not local_path(name).is_dir():
            raise ValueError(
                f"source {name!r} is not one of {sorted(SOURCES)}, nor a directory of prepared data"
            )
    return [
        SOURCES[name](experiment, split)
        if name in SOURCES
        else Prepared(Path(name), experiment, split)
        for name in names
    ]
