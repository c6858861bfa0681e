"""Transfusion 0.16B with linear 2x2 patches: the controlled setting of section 4.1.

    transfusion-jax train experiments/transfusion_0_16b.py

Size: Table 2. Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:4x4, 16 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 7): C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP
    14.8 / 8.8 / 44.2 / 6.2 / 37.6 / 20.0
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    base = paper("0.16B")
    return replace(
        base,
        model=replace(base.model, remat="none"),
        train=replace(base.train, accumulation=8),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5e:4x4"),
    )
