"""The large run of section 4.4: 7B with a U-Net, 2 T tokens, pictures of high aesthetic quality
more often in the last 1 % of steps.

    transfusion-jax train experiments/large_run.py

Data: prepare your own into the three folders below (docs/data.md). The paper has 1 T tokens of
text, and 3.5 B captioned images in all.
Hardware: v5p:4x4x8, 128 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 9): Llama acc 66.1, COCO FID 6.78, GenEval 0.63; beside the run with
`transfusion-jax sweep experiments/large_run.py --list`.

The paper does not say whether noise is limited here, nor how much more often these pictures are
seen: we limit it, as Table 8 suggests, and take half of the pictures from them.
"""

from collections.abc import Iterator
from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, PhaseConfig, SourceConfig, unet

TEXT, PICTURES, AESTHETIC = "data/text", "data/pictures", "data/aesthetic"
PAIRS = 0.57
"""Share of rows of pictures and captions. An image is 256 patches, and 290 positions with a caption
of 30 tokens and the marks around both; so half of all positions are patches."""


def config() -> Experiment:
    base = unet("7B")
    sources = (
        SourceConfig(TEXT, 1 - PAIRS),
        SourceConfig(PICTURES, PAIRS),
        SourceConfig(AESTHETIC, 0.0),
    )
    last = PhaseConfig(0.99, (1 - PAIRS, PAIRS / 2, PAIRS / 2))
    return replace(
        base,
        name="large_run",
        diffusion=replace(base.diffusion, noise_limit=500),
        data=replace(base.data, sources=sources, phases=(last,), batch_rows=1024),
        train=replace(base.train, steps=500_000),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5p:4x4x8"),
    )


def sweep() -> Iterator[Experiment]:
    yield config()


def published() -> dict[str, dict[str, float]]:
    return {"large_run": {"llama_accuracy": 66.1, "fid": 6.78, "geneval": 0.63}}
