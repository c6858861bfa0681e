"""Table 3 (section 4.2): Transfusion against Chameleon, at all sizes of Table 2.

    transfusion-jax sweep experiments/table3.py --list

The table is of 7B; its last row, the share of Chameleon's FLOPs at which Transfusion is as good
(parity), is read off a line through all sizes: .489 / .526 / .600 / .218 / .029 / .319.
Images are drawn with guidance 5.

Data: noise with the lengths of web data (`synthetic`), until you name real ones: latents for the
one, codes of a VQ autoencoder for the other.
Hardware: each point's slice, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published: C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP, beside each point with --list.
"""

from collections.abc import Iterator
from dataclasses import replace

from paper_tables import point, row

from transfusion_jax.config import TABLE_2, Experiment, chameleon, paper


def sweep() -> Iterator[Experiment]:
    for size in TABLE_2:
        for base in (paper(size), chameleon(size)):
            guided = replace(base, sampler=replace(base.sampler, guidance=5.0))
            yield point(guided, base.name, size)


def published() -> dict[str, dict[str, float]]:
    return {
        "transfusion_7B": row(7.72, 4.28, 61.5, 27.2, 16.8, 25.5),
        "chameleon_7B": row(8.41, 4.69, 59.1, 18.0, 29.6, 24.3),
    }
