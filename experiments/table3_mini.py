r"""Table 3 on digits: Transfusion against Chameleon, and Llama on the text, at three sizes.

    transfusion-jax train experiments/digits.py --run-dir runs/digits
    python experiments/write_digits.py data/raw/digits
    transfusion-jax prepare data/raw/digits --out data/digits --height 8 --width 8 --channels 1 \
        --held-out 0.1 --tokenizer runs/digits/tokenizer.model
    transfusion-jax autoencoder experiments/vq_digits.py
    transfusion-jax prepare data/raw/digits --out data/digits_codes --height 8 --width 8 \
        --channels 1 --held-out 0.1 --tokenizer runs/digits/tokenizer.model \
        --autoencoder runs/vq_digits
    transfusion-jax sweep experiments/table3_mini.py

An image is 16 patches of 2x2 pixels to the one, 16 codes of 64 to the other, so rows are the
same, and FLOPs but for the logits of codes. Neither learns where a patch is in its picture, which
for codes the code does not do. The other half of the rows are comparisons in words;
Llama has them in every row, so twice as many. Of the changes for stability Chameleon has norms and
z-loss; the learning rate is that of all.
Hardware: two CPU cores, 61 minutes of training beside other work: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from digits import config as digits

from transfusion_jax.config import Experiment, ImageConfig, SourceConfig

PICTURES, CODES = "data/digits", "data/digits_codes"
SIZES = {"small": (2, 64), "medium": (3, 96), "large": (4, 128)}
"""Layers and width."""


def base(size: str) -> Experiment:
    """Transfusion on the digits as prepared pixels, and on comparisons, for 800 steps of AdamW."""
    whole = digits()
    layers, width = SIZES[size]
    return replace(
        whole,
        model=replace(
            whole.model, layers=layers, width=width, mlp_width=3 * width, patch_position="rope"
        ),
        data=replace(whole.data, sources=_sources(PICTURES)),
        optimizer=replace(whole.optimizer, kind="adamw"),
        train=replace(whole.train, steps=800),
        evaluation=("digits", "comparisons", "likelihood"),
    )


def stabilised(base: Experiment) -> Experiment:
    """With Chameleon's norms and z-loss."""
    return replace(
        base,
        model=replace(base.model, qk_norm=True, norm_placement="post"),
        train=replace(base.train, z_loss=1e-5),
    )


def chameleon(base: Experiment) -> Experiment:
    """On the digits as codes."""
    stable = stabilised(base)
    return replace(
        stable,
        image=ImageConfig(height=4, width=4, channels=1, patch=1, codes=64),
        model=replace(stable.model, family="chameleon", image_attention="causal"),
        data=replace(stable.data, sources=_sources(CODES)),
    )


def llama(base: Experiment) -> Experiment:
    """On the text alone, for as many steps: twice the text of the others."""
    return replace(
        base,
        model=replace(base.model, family="llama", image_attention="causal"),
        data=replace(base.data, sources=(SourceConfig("comparisons"),)),
        evaluation=("comparisons", "likelihood"),
    )


def sweep() -> Iterator[Experiment]:
    for size in SIZES:
        yield from with_seeds(f"transfusion_{size}", base(size))
        yield from with_seeds(f"chameleon_{size}", chameleon(base(size)))
        yield from with_seeds(f"llama_{size}", llama(base(size)))


def with_seeds(name: str, point: Experiment) -> Iterator[Experiment]:
    for seed in (0, 1):
        train = replace(point.train, seed=seed)
        yield replace(point, name=f"{name}_{seed}", train=train)


def _sources(pictures: str) -> tuple[SourceConfig, ...]:
    return SourceConfig(pictures), SourceConfig("comparisons")
