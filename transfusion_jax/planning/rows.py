"""What the rows of an experiment ask of the model: images, and the query-key pairs of their intervals."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transfusion_jax.config import Experiment, SourceConfig
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.model.attention.block_pairs import visible_blocks
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.pretraining.run import tokenizer_of

SAMPLE = 32


@dataclass(frozen=True)
class Rows:
    """Some rows of a run."""

    intervals: Intervals
    images: float
    """In each, on average."""
    origin: str
    """A word on where they come from."""


@dataclass(frozen=True)
class RowWork:
    """Means over rows."""

    images: float
    pairs: float
    """Pairs of a query and a key that it sees."""
    visited_pairs: float
    """Pairs of the blocks in which some query sees some key: what a kernel computes."""
    walked_blocks: float
    """Key blocks that lie between the first and the last that a block of queries sees in any of the rows which a device
    has together: what chunked attention computes, in a loop whose length only the data know."""


def sample_rows(experiment: Experiment) -> Rows:
    """The run's first rows.

    Where the data are not at hand, rows of the `synthetic` source stand in for them, which is said.
    """
    try:
        data = Data(experiment, tokenizer_of(experiment, Path("runs") / experiment.name))
        origin = "of its data"
    except ValueError as error:
        synthetic = replace(experiment.data, sources=(SourceConfig("synthetic"),), phases=())
        data = Data(replace(experiment, data=synthetic), train_tokenizer(["synthetic text"], 300))
        origin = f"of the synthetic source, as its data are not here ({error})"
    rows, count = data.rows(), min(SAMPLE, experiment.data.batch_rows)
    batch = jax.tree.map(jnp.asarray, stack([rows[i] for i in range(count)]))
    intervals = row_intervals(batch, experiment.image.patches)
    return Rows(intervals, float(batch.image_weight_BM.sum()) / count, f"{count} rows {origin}")


def row_work(rows: Rows, block: int, together: int = 1) -> RowWork:
    """Counts for attention in blocks of `block` positions; 0 is one block, as in the dense reference.

    Args:
      together: rows that a device works on at a time.
    """
    intervals = rows.intervals
    count, length = intervals.k_start_BL.shape
    block = min(block or length, length)
    start, end = (
        jnp.pad(x, ((0, 0), (0, -length % block)))
        for x in (intervals.k_start_BL, intervals.k_end_BL)
    )
    some, _ = visible_blocks(start, end, block, block, -(-length // block))
    some = np.asarray(some)
    pairs = np.maximum(np.asarray(intervals.k_end_BL) - np.asarray(intervals.k_start_BL), 0).sum(
        dtype=np.int64
    )
    groups = np.stack([some[i : i + together].any(0) for i in range(0, count, together)])
    # What lies between the first and the last that are seen: not before the one, nor behind the other.
    after_first = np.logical_or.accumulate(groups, axis=2)
    before_last = np.logical_or.accumulate(groups[..., ::-1], axis=2)[..., ::-1]
    walked = (after_first & before_last).sum(2).mean()
    return RowWork(rows.images, float(pairs) / count, some.sum() / count * block**2, float(walked))


def model_flops(parameters: Any, experiment: Experiment, work: RowWork) -> float:
    """FLOPs of a step, forward and backward: 6 for every weight and vector that it is multiplied with, 12 H for every
    pair, head and layer. Nothing that is computed again counts, nor any pair that is not seen.

    Args:
      parameters: the model's, or their shapes, as a nested dict.
    """
    image, model = experiment.image, experiment.model
    patch = sum(
        x.size
        for name, x in parameters["patches"].items()
        if not name.startswith(("time", "position"))
    )
    time = sum(x.size for name, x in parameters["patches"].items() if name.startswith("time"))
    blocks = sum(x.size for x in jax.tree.leaves(parameters["transformer"]["blocks"]) if x.ndim > 2)
    row = (blocks + parameters["output_DV"].size) * experiment.data.row_length
    row += work.images * (patch * image.patches + time)
    return experiment.data.batch_rows * (6.0 * row + 12.0 * work.pairs * model.width * model.layers)
