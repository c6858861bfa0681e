"""Table 6 (section 4.3): sizes of patches, at 0.76B.

    transfusion-jax sweep experiments/table6.py --list

An image of 32x32 latents is 1,024, 256, 64 or 16 patches. Patches of 1x1 have linear layers too,
from 8 channels to the width of the transformer. Text and patches stay 1:1, so larger patches are
more images a batch.

Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:8x8, 64 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published: C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP, beside each point with --list.
"""

from collections.abc import Iterator
from dataclasses import replace

from paper_tables import point, row

from transfusion_jax.config import Experiment, paper, unet

SIZE = "0.76B"


def sweep() -> Iterator[Experiment]:
    for patch in (1, 2, 4, 8):
        yield _patches(paper(SIZE), "linear" if patch > 1 else "none", patch)
    for patch in (2, 4, 8):
        yield _patches(unet(SIZE), "unet", patch)


def _patches(base: Experiment, encoder: str, patch: int) -> Experiment:
    changed = replace(base, image=replace(base.image, patch=patch))
    return point(changed, f"{encoder}_{patch}x{patch}", SIZE)


def published() -> dict[str, dict[str, float]]:
    return {
        "none_1x1": row(10.3, 5.9, 52.2, 12.0, 21.0, 24.0),
        "linear_2x2": row(10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
        "linear_4x4": row(10.9, 6.3, 49.8, 14.3, 25.6, 22.6),
        "linear_8x8": row(11.7, 6.9, 47.7, 11.3, 43.5, 18.9),
        "unet_2x2": row(10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
        "unet_4x4": row(10.7, 6.2, 50.7, 29.9, 16.0, 25.7),
        "unet_8x8": row(11.4, 6.6, 49.2, 29.5, 16.1, 25.2),
    }
