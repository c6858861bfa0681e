"""Table 5 (section 4.3): causal against bidirectional attention inside an image, at 0.76B.

    transfusion-jax sweep experiments/table5.py --list

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
    for encoder, base in (("linear", paper(SIZE)), ("unet", unet(SIZE))):
        for attention in ("causal", "bidirectional"):
            changed = replace(base, model=replace(base.model, image_attention=attention))
            yield point(changed, f"{encoder}_{attention}", SIZE)


def published() -> dict[str, dict[str, float]]:
    return {
        "linear_causal": row(10.4, 6.0, 51.4, 12.7, 61.3, 23.0),
        "linear_bidirectional": row(10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
        "unet_causal": row(10.3, 5.9, 52.0, 23.3, 16.8, 25.3),
        "unet_bidirectional": row(10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
    }
