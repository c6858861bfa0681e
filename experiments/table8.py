"""Table 8 (section 4.3): images that come before their caption with any noise, or with at most half
of the timesteps.

    transfusion-jax sweep experiments/table8.py --list

Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: each point's slice, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published: C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP, beside each point with --list.
"""

from collections.abc import Iterator
from dataclasses import replace

from paper_tables import point, row

from transfusion_jax.config import Experiment, unet


def sweep() -> Iterator[Experiment]:
    for size in ("0.76B", "7B"):
        for name, limit in (("any_noise", 0), ("limited_noise", 500)):
            base = unet(size)
            changed = replace(base, diffusion=replace(base.diffusion, noise_limit=limit))
            yield point(changed, f"{name}_{size}", size)


def published() -> dict[str, dict[str, float]]:
    return {
        "any_noise_0.76B": row(10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
        "limited_noise_0.76B": row(10.3, 5.9, 52.1, 29.4, 16.5, 25.4),
        "any_noise_7B": row(7.8, 4.3, 61.1, 33.7, 16.0, 26.5),
        "limited_noise_7B": row(7.7, 4.3, 60.9, 35.2, 15.7, 26.3),
    }
