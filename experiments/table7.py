"""Table 7 (section 4.3): linear patches against a U-Net, at all sizes of Table 2.

    transfusion-jax sweep experiments/table7.py --list

The U-Net has about 0.27 B parameters whatever the transformer (`UNET_WIDTHS`).

Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: each point's slice, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published: C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP, beside each point with --list.
"""

from collections.abc import Iterator

from paper_tables import point, row

from transfusion_jax.config import TABLE_2, Experiment, paper, unet


def sweep() -> Iterator[Experiment]:
    for size in TABLE_2:
        yield point(paper(size), f"linear_{size}", size)
        yield point(unet(size), f"unet_{size}", size)


def published() -> dict[str, dict[str, float]]:
    return {
        "linear_0.16B": row(14.8, 8.8, 44.2, 6.2, 37.6, 20.0),
        "unet_0.16B": row(14.4, 8.5, 45.7, 15.3, 18.8, 23.9),
        "linear_0.37B": row(12.0, 7.0, 47.9, 11.1, 21.5, 22.4),
        "unet_0.37B": row(11.8, 6.9, 48.8, 21.1, 18.1, 24.9),
        "linear_0.76B": row(10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
        "unet_0.76B": row(10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
        "linear_1.4B": row(9.5, 5.4, 53.8, 19.1, 19.4, 24.3),
        "unet_1.4B": row(9.4, 5.4, 53.4, 28.1, 16.6, 25.7),
        "linear_7B": row(7.7, 4.3, 61.5, 27.2, 18.6, 25.9),
        "unet_7B": row(7.8, 4.3, 61.1, 33.7, 16.0, 26.5),
    }
