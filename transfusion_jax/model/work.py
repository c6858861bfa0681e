"""The work that packed rows give a model, and the FLOPs it takes.

Counted on the host from the rows themselves: planning counts sample rows, training the rows that
it trains on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from transfusion_jax.batch import Batch
from transfusion_jax.config import Experiment


@dataclass(frozen=True)
class Work:
    """Means over rows."""

    images: float
    targets: float
    """Positions with a text target: their logits are what the loss needs."""
    pairs: float
    """Pairs of a query and a key that it sees."""


def batch_work(batch: Batch, patches: int) -> Work:
    """The work of a batch of NumPy arrays, `patches` of whose images see one another.

    A position sees the positions up to itself in its document, a patch the later patches of its
    image as well: the pairs of `row_intervals`, whose mask need not be built.
    """
    segment_BL = batch.segment_BL
    rows, length = segment_BL.shape
    images = np.count_nonzero(batch.image_start_BM < length)
    # RoPE positions count from the start of a document, in the part of it that a row holds.
    causal = np.sum(batch.position_BL + 1, where=segment_BL > 0, dtype=np.int64)
    pairs = int(causal) + images * (patches * (patches - 1) // 2)
    targets = np.count_nonzero(batch.text_weight_BL > 0)
    return Work(images / rows, targets / rows, pairs / rows)


def model_flops(
    multiplications: Mapping[str, int],
    experiment: Experiment,
    work: Work,
    trained: Mapping[str, int] | None = None,
) -> float:
    """FLOPs that a step needs, forward and backward.

    6 per weight and vector it multiplies, 4 if the weight is frozen and so has no gradient: blocks
    multiply every position, the vocabulary projection positions with a text target, patch layers
    patches. 12 H per head, layer and pair of positions that may see each other. Not counted:
    recomputation, computed pairs that are masked, and logits that enter no loss. Too many are
    counted where nothing before a frozen weight is trained: it has no backward pass at all.

    Args:
      multiplications: of the model, as `Model.multiplications` gives them.
      trained: of the weights that are trained; None: all are.
    """
    config = experiment.model
    counts = {
        "position": experiment.data.row_length,
        "target": work.targets,
        "patch": work.images * experiment.image.patches,
        "image": work.images,
    }
    trained = multiplications if trained is None else trained
    weights = sum((4.0 * n + 2.0 * trained[of]) * counts[of] for of, n in multiplications.items())
    attention = work.pairs * config.width * config.layers
    return experiment.data.batch_rows * (weights + 12.0 * attention)
