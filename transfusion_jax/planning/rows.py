"""The work that the rows of an experiment give the model: images, text targets, and query-key
pairs."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment, SourceConfig
from transfusion_jax.data.pipeline import Data, stack
from transfusion_jax.data.tokenizer import train_tokenizer
from transfusion_jax.model.attention.block_pairs import visible_blocks
from transfusion_jax.model.attention.intervals import Intervals, row_intervals
from transfusion_jax.model.interface import Model
from transfusion_jax.pretraining.run import tokenizer_of

SAMPLE = 32


@dataclass(frozen=True)
class Rows:
    """Some rows of a run. Numbers are means over rows."""

    intervals: Intervals
    images: float
    targets: float
    """Positions with a text target: their logits are what the loss needs."""
    origin: str
    """Where they come from, in a few words."""


@dataclass(frozen=True)
class RowWork:
    """Means over rows."""

    images: float
    targets: float
    pairs: float
    """Pairs of a query and a key that it sees."""
    computed_pairs: float
    """Pairs of a query and a key in the pairs of blocks that a kernel computes: those in which some
    query sees some key."""
    loop_blocks: float
    """Key blocks from the first to the last that a block of queries sees in any of the rows which a
    device has together: chunked attention computes them in a loop whose length depends on data."""


def rows_of(batch: Batch, patches: int, origin: str) -> Rows:
    """The rows of a batch whose images have `patches` patches."""
    batch = jax.tree.map(jnp.asarray, batch)
    count = len(batch.tokens_BL)
    return Rows(
        row_intervals(batch, patches),
        float(batch.image_weight_BM.sum()) / count,
        float((batch.text_weight_BL > 0).sum()) / count,
        origin,
    )


def sample_rows(experiment: Experiment) -> Rows:
    """The run's first rows.

    Where its data are missing, rows of the `synthetic` source stand in for them, and `origin` says
    so.
    """
    try:
        data = Data(experiment, tokenizer_of(experiment, Path("runs") / experiment.name))
        origin = "of its data"
    except ValueError as error:
        synthetic = replace(experiment.data, sources=(SourceConfig("synthetic"),), phases=())
        data = Data(replace(experiment, data=synthetic), train_tokenizer(["synthetic text"], 300))
        origin = f"of the synthetic source, as its data are missing ({error})"
    rows, count = data.rows(), min(SAMPLE, experiment.data.batch_rows)
    batch = stack([rows[i] for i in range(count)])
    return rows_of(batch, experiment.image.patches, f"{count} rows {origin}")


def row_work(rows: Rows, block: int, together: int = 1) -> RowWork:
    """Counts for attention in blocks of `block` positions; 0 is one block, as in the dense
    reference.

    Args:
      together: rows that a device works on at a time.
    """
    start_BL, end_BL = rows.intervals.k_start_BL, rows.intervals.k_end_BL
    count, length = start_BL.shape
    block = min(block or length, length)
    pad = ((0, 0), (0, -length % block))
    some, _ = visible_blocks(
        jnp.pad(start_BL, pad), jnp.pad(end_BL, pad), block, block, -(-length // block)
    )
    some = np.asarray(some)
    pairs = np.maximum(np.asarray(end_BL) - np.asarray(start_BL), 0).sum(dtype=np.int64)
    return RowWork(
        images=rows.images,
        targets=rows.targets,
        pairs=float(pairs) / count,
        computed_pairs=some.sum() / count * block**2,
        loop_blocks=_loop_blocks(some, together),
    )


def _loop_blocks(some: np.ndarray, together: int) -> float:
    """Key blocks from the first to the last that is seen, summed over query blocks; a mean over
    groups of rows."""
    groups = np.stack([some[i : i + together].any(0) for i in range(0, len(some), together)])
    from_first = np.logical_or.accumulate(groups, axis=2)
    to_last = np.logical_or.accumulate(groups[..., ::-1], axis=2)[..., ::-1]
    return float((from_first & to_last).sum(2).mean())


def model_flops(model: Model, experiment: Experiment, work: RowWork) -> float:
    """FLOPs that a step, forward and backward, cannot do without.

    6 for every weight and vector that it is multiplied with: blocks with every position, the
    vocabulary projection with positions that have a text target, patch layers with patches. 12 H
    for every head, layer and pair of positions that may see each other. Not counted are
    recomputation, pairs that are computed but not seen, and logits, computed or not, that enter no
    loss.
    """
    config = experiment.model
    counts = {
        "position": experiment.data.row_length,
        "target": work.targets,
        "patch": work.images * experiment.image.patches,
        "image": work.images,
    }
    weights = sum(n * counts[of] for of, n in model.multiplications().items())
    attention = work.pairs * config.width * config.layers
    return experiment.data.batch_rows * (6.0 * weights + 12.0 * attention)
