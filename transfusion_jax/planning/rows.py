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
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.attention.visits import visible_blocks
from transfusion_jax.training.run import tokenizer_of

SAMPLE = 32


@dataclass(frozen=True)
class RowWork:
    """Means over some rows."""

    images: float
    pairs: float
    """Pairs of a query and a key that it sees."""
    visited_pairs: float
    """Pairs of the blocks in which some query sees some key: what a kernel computes."""
    visited_blocks: float
    """Such key blocks, for a block of queries."""


def sample_rows(experiment: Experiment) -> tuple[Intervals, float, str]:
    """Intervals of the run's first rows, the mean number of their images, and a word on where they come from.

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
    return intervals, float(batch.image_weight_BM.sum()) / count, f"{count} rows {origin}"


def row_work(intervals: Intervals, images: float, block: int) -> RowWork:
    """Counts for attention in blocks of `block` positions; 0 is one block, as in the dense reference."""
    rows, length = intervals.k_start_BL.shape
    block = min(block or length, length)
    start, end = (jnp.pad(x, ((0, 0), (0, -length % block))) for x in (intervals.k_start_BL, intervals.k_end_BL))
    some, _ = visible_blocks(start, end, block, block, -(-length // block))
    pairs = np.maximum(np.asarray(intervals.k_end_BL) - np.asarray(intervals.k_start_BL), 0).sum(dtype=np.int64)
    blocks = float(some.sum()) / rows
    return RowWork(images, float(pairs) / rows, blocks * block * block, blocks / some.shape[1])


def model_flops(parameters: Any, experiment: Experiment, work: RowWork) -> float:
    """FLOPs of a step, forward and backward: 6 for every weight and vector that it is multiplied with, 12 H for every
    pair, head and layer. Nothing that is computed again counts, nor any pair that is not seen.

    Args:
      parameters: the model's, or their shapes, as a nested dict.
    """
    image, model = experiment.image, experiment.model
    patch = sum(x.size for name, x in parameters["patches"].items() if not name.startswith(("time", "position")))
    time = sum(x.size for name, x in parameters["patches"].items() if name.startswith("time"))
    blocks = sum(x.size for x in jax.tree.leaves(parameters["transformer"]["blocks"]) if x.ndim > 2)
    row = (blocks + parameters["output_DV"].size) * experiment.data.row_length
    row += work.images * (patch * image.patches + time)
    return experiment.data.batch_rows * (6.0 * row + 12.0 * work.pairs * model.width * model.layers)
