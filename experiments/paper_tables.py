"""What the files of Tables 3 to 8 share: the slices that points are planned for, and the columns of
the paper."""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig

SLICES = {
    "0.16B": "v5e:4x4",
    "0.37B": "v5e:4x8",
    "0.76B": "v5e:8x8",
    "1.4B": "v5e:8x16",
    "7B": "v5p:4x4x4",
}
COLUMNS = ("c4_perplexity", "wiki_perplexity", "llama_accuracy", "cider", "fid", "clip_score")


def point(base: Experiment, name: str, size: str, microbatches: int = 1) -> Experiment:
    """A point of a table: `base` under another name, planned for the slice of its size."""
    return replace(
        base,
        name=name,
        mesh=MeshConfig(data=1, fsdp=-1, topology=SLICES[size]),
        train=replace(base.train, accumulation=microbatches),
    )


def row(*numbers: float) -> dict[str, float]:
    """Published numbers in the order of the paper's columns; a text-only model has the first
    three."""
    return dict(zip(COLUMNS, numbers, strict=False))
