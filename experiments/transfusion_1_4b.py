"""Transfusion 1.4B with linear 2x2 patches: the controlled setting of section 4.1.

    transfusion-jax train experiments/transfusion_1_4b.py

Size: Table 2. Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:8x16, 128 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 7): C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP
    9.5 / 5.4 / 53.8 / 19.1 / 19.4 / 24.3
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    base = paper("1.4B")
    return replace(
        base,
        model=replace(base.model, remat="minimal"),
        train=replace(base.train, accumulation=2),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5e:8x16"),
    )
