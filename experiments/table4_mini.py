"""Table 4 on digits: from Llama to Transfusion, and to Chameleon, step by step.

    transfusion-jax sweep experiments/table4_mini.py

Its data is that of table3_mini.py, which says how it is prepared.
Hardware: two CPU cores: docs/results.md.
"""

from collections.abc import Iterator

from table3_mini import base, chameleon, llama, stabilised, with_seeds

from transfusion_jax.config import Experiment

SIZE = "medium"


def sweep() -> Iterator[Experiment]:
    small = base(SIZE)
    points = {
        "llama": llama(small),
        "transfusion": small,
        "stable_llama": stabilised(llama(small)),
        "chameleon": chameleon(small),
    }
    for name, experiment in points.items():
        yield from with_seeds(name, experiment)
