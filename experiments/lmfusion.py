"""LMFusion: a text model learns to draw and to see, and stays the text model that it was (Shi et
al. 2024, arXiv 2412.15188).

    transfusion-jax train experiments/lmfusion.py:lmfusion_text
    transfusion-jax export runs/lmfusion_text --format safetensors --out exported/lmfusion_text
    transfusion-jax train experiments/lmfusion.py:lmfusion

The first is a Llama of sums and comparisons. The second has its weights, frozen, for text, and a
copy of them, trained, for images, beside new layers from pixels and to them. The text losses of
sums and comparisons are the same number at every validation. It never begins an image by itself:
BOI was no word of the Llama's. So `generate --draw` draws, and the suite `digits`, which leaves it
to the model, sees nothing drawn.

For a Llama of others: `import`, then `--train.initial DIR --tokenizer.path DIR/tokenizer.model`.
Hardware: two CPU cores, five minutes for the first by the digits, somewhat more for the second.
Run for 400 steps each: docs/results.md.
"""

from collections.abc import Iterator
from dataclasses import replace

from digits import config as digits

from transfusion_jax.config import Experiment, SourceConfig, TokenizerConfig

TEXT = "exported/lmfusion_text"
"""What the Llama is exported to."""
FROZEN = ("embedding_VD", "output_DV", "transformer.blocks.*", "transformer.norm.*")


def sweep() -> Iterator[Experiment]:
    base = digits()
    sentences = (SourceConfig("sums"), SourceConfig("comparisons"))
    yield replace(
        base,
        name="lmfusion_text",
        model=replace(base.model, family="llama", image_attention="causal"),
        data=replace(base.data, sources=sentences),
        evaluation=("sums", "comparisons", "likelihood"),
    )
    yield replace(
        base,
        name="lmfusion",
        model=replace(base.model, experts="modality"),
        data=replace(base.data, sources=(SourceConfig("digits"), *sentences)),
        tokenizer=TokenizerConfig(path=f"{TEXT}/tokenizer.model"),
        train=replace(base.train, initial=TEXT, freeze=FROZEN, validate_every=500),
    )
