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
from transfusion_jax.model.work import Work, batch_work
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
class RowWork(Work):
    """Means over rows, with what an implementation of attention computes."""

    computed_pairs: float
    """Pairs of a query and a key in the pairs of blocks that a kernel computes: those in which some
    query sees some key."""
    loop_blocks: float
    """Key blocks from the first to the last that a block of queries sees in any of the rows that a
    device processes together: chunked attention loops over them, and the length depends on data."""


def rows_of(batch: Batch, patches: int, origin: str) -> Rows:
    """The rows of a batch in whose images `patches` see one another."""
    work = batch_work(jax.tree.map(np.asarray, batch), patches)
    intervals = row_intervals(jax.tree.map(jnp.asarray, batch), patches)
    return Rows(intervals, work.images, work.targets, origin)


def sample_rows(experiment: Experiment) -> Rows:
    """The run's first rows.

    If its data is missing, rows of the `synthetic` source take its place, and `origin` says so.
    """
    try:
        data = Data(experiment, tokenizer_of(experiment, Path("runs") / experiment.name))
        origin = "of its data"
    except ValueError as error:
        synthetic = replace(experiment.data, sources=(SourceConfig("synthetic"),), phases=())
        data = Data(replace(experiment, data=synthetic), train_tokenizer(["synthetic text"], 300))
        origin = f"of the synthetic source, as its data is missing ({error})"
    rows = data.rows()
    count = min(SAMPLE, experiment.data.batch_rows)
    batch = stack([rows[i] for i in range(count)])
    return rows_of(
        batch, experiment.model.mutual_patches(experiment.image), f"{count} rows {origin}"
    )


def row_work(rows: Rows, block: int, together: int = 1) -> RowWork:
    """Work of attention in blocks of `block` positions; 0 is one block, as in the dense reference.

    Args:
      together: rows that a device processes at a time.
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
    """Key blocks from the first to the last one seen, over query blocks; mean over groups of
    rows."""
    groups = np.stack([some[i : i + together].any(0) for i in range(0, len(some), together)])
    from_first = np.logical_or.accumulate(groups, axis=2)
    to_last = np.logical_or.accumulate(groups[..., ::-1], axis=2)[..., ::-1]
    return float((from_first & to_last).sum(2).mean())
