"""Transfusion 7B with linear 2x2 patches: the controlled setting of section 4.1.

    transfusion-jax train experiments/transfusion_7b.py

Size: Table 2. Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5p:4x4x4, 64 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 7): C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP
    7.7 / 4.3 / 61.5 / 27.2 / 18.6 / 25.9
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    base = paper("7B")
    return replace(
        base,
        model=replace(base.model, remat="minimal"),
        train=replace(base.train, accumulation=2),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5p:4x4x4"),
    )
