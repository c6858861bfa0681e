"""Table 4 (section 4.2): from Llama 2 to Transfusion, and to Chameleon, at 0.76B.

    transfusion-jax sweep experiments/table4.py --list

Transfusion is Llama with diffused images. Chameleon is Llama with the changes for stability (on
text alone: `stable_llama`), then with image tokens under the language-modelling loss.

Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:8x8, 64 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published: C4 PPL / Wiki PPL / Llama acc, beside each point with --list.
"""

from collections.abc import Iterator

from paper_tables import point, row

from transfusion_jax.config import Experiment, chameleon, llama, paper, stabilised

SIZE = "0.76B"


def sweep() -> Iterator[Experiment]:
    yield point(llama(SIZE), "llama", SIZE)
    yield point(paper(SIZE), "transfusion", SIZE)
    yield point(stabilised(llama(SIZE)), "stable_llama", SIZE)
    yield point(chameleon(SIZE), "chameleon", SIZE)


def published() -> dict[str, dict[str, float]]:
    return {
        "llama": row(10.1, 5.8, 53.7),
        "transfusion": row(10.4, 6.0, 51.7),
        "stable_llama": row(11.0, 6.3, 51.9),
        "chameleon": row(11.8, 6.8, 48.9),
    }
