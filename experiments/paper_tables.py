"""What the files of Tables 3 to 8 share: the slices that points are planned for, and the columns of
the paper."""

import math
from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig

SLICES = {
    "0.16B": "v5e:4x4",
    "0.37B": "v5e:4x8",
    "0.76B": "v5e:8x8",
    "1.4B": "v5e:8x16",
    "7B": "v5p:4x4x4",
}
UNET_ROWS = {2: 4, 4: 1, 8: 1}
"""By the side of a patch: rows whose images a v5e chip puts through a U-Net at a time. It computes
every slot of a row that an image may be in: 15, 62 or 227."""
COLUMNS = ("c4_perplexity", "wiki_perplexity", "llama_accuracy", "cider", "fid", "clip_score")


def point(base: Experiment, name: str, size: str) -> Experiment:
    """A point of a table: `base` under another name, fitted to the slice of its size."""
    chip, _, layout = SLICES[size].partition(":")
    rows = base.data.batch_rows // math.prod(map(int, layout.split("x")))
    small = chip == "v5e" and base.model.patch_encoder == "unet"
    parts = max(1, rows // UNET_ROWS[base.image.patch]) if small else 1
    return replace(
        base,
        name=name,
        mesh=MeshConfig(data=1, fsdp=-1, topology=SLICES[size]),
        train=replace(base.train, accumulation=parts),
    )


def row(*numbers: float) -> dict[str, float]:
    """Published numbers in the order of the paper's columns; a text-only model has the first
    three."""
    return dict(zip(COLUMNS, numbers, strict=False))
