"""Emoji and speeches: real colour pictures with real captions, and real text, from the files on.

    python experiments/fetch_emoji.py data/raw
    transfusion-jax prepare data/raw/speeches --out data/speeches --vocab-size 4000 --held-out 0.05
    transfusion-jax prepare data/raw/emoji --out data/emoji --height 32 --width 32 --held-out 0.02 \
        --tokenizer data/speeches/tokenizer.model
    transfusion-jax train experiments/emoji.py

Hardware: two CPU cores, 20 minutes in all; 3.9e13 FLOPs.
Expected: held-out text perplexity 116; many emoji can be recognised, and belong to the group that
was asked for in 48 % of drawings, 4.3 times chance, by a judge that takes 58 % of real ones for
what they are (docs/data.md).
"""

from dataclasses import replace

from own_data import config as own_data

from transfusion_jax.config import Experiment, SourceConfig

PICTURES, TEXT = "data/emoji", "data/speeches"


def config() -> Experiment:
    base = own_data(PICTURES)
    return replace(
        base,
        name="emoji",
        data=replace(base.data, sources=(SourceConfig(PICTURES, 4.0), SourceConfig(TEXT, 1.0))),
    )
