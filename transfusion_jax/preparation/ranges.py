"""Which items each shard holds: ranges of about equal size in bytes, estimated from a sample.

They are fixed before the first shard is made, and depend on the items and the settings alone, so
any process can make any shard.
"""

from collections.abc import Sequence

import numpy as np

from transfusion_jax.data.sources import records
from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.preparation.readers.raw import Picture, Reader, Rejected

SAMPLED = 4096  # items, of all inputs together
SAMPLED_OF_INPUT = 256
RECORD_BYTES = 64  # of a record, besides its images and tokens
MOST_ITEMS = 1 << 16
"""Of a shard; to find a record takes time that grows with the records in its shard: 0.08 ms among
33 thousand, 0.9 ms among half a million."""
LEAST_ITEMS = 64  # of a shard, except where there are fewer
SHARDS = 64  # of small inputs, so that there is work for many processes


def shard_bounds(
    readers: Sequence[Reader], tokenizer: Tokenizer, picture_bytes: int, shard_bytes: int
) -> np.ndarray:
    """Shard k holds the items [bounds[k], bounds[k + 1]), numbered over all readers; int64.

    Args:
      picture_bytes: of a stored picture.
      shard_bytes: of a shard, about.
    """
    sampled = min(SAMPLED_OF_INPUT, max(SAMPLED // len(readers), 1))
    least = shard_bytes / MOST_ITEMS
    sizes = [max(item_bytes(r, sampled, tokenizer, picture_bytes), least) for r in readers]
    items = np.cumsum([0, *map(len, readers)])
    ends = np.cumsum([0, *(n * len(r) for n, r in zip(sizes, readers, strict=True))])
    count = max(
        int(np.ceil(ends[-1] / shard_bytes)), min(SHARDS, -(-int(items[-1]) // LEAST_ITEMS))
    )
    bounds = np.interp(np.linspace(0, ends[-1], count + 1), ends, items).round().astype(np.int64)
    return np.unique(np.concatenate([[0], bounds, [items[-1]]]))


def item_bytes(reader: Reader, sampled: int, tokenizer: Tokenizer, picture_bytes: int) -> float:
    """The mean size of the records of a reader's items, over so many of them, evenly spread."""
    if not len(reader):
        return 0.0
    ids = records.id_type(tokenizer.size).itemsize
    total = 0
    chosen = np.unique(np.linspace(0, len(reader) - 1, sampled).astype(np.int64)).tolist()
    for index in chosen:
        try:
            raw = reader[index]
        except Rejected:
            continue
        texts = [*raw.captions, *(x for x in raw.spans if not isinstance(x, Picture))]
        tokens = sum(len(tokenizer.encode(x.encode(errors="ignore").decode())) for x in texts)
        pictures = sum(isinstance(x, Picture) for x in raw.spans)
        total += RECORD_BYTES + pictures * picture_bytes + tokens * ids
    return total / len(chosen)
