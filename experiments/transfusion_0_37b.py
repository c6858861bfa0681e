"""Transfusion 0.37B with linear 2x2 patches: the controlled setting of section 4.1.

    transfusion-jax train experiments/transfusion_0_37b.py

Size: Table 2. Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:4x8, 32 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 7): C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP
    12.0 / 7.0 / 47.9 / 11.1 / 21.5 / 22.4
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    base = paper("0.37B")
    return replace(
        base,
        model=replace(base.model, remat="minimal"),
        train=replace(base.train, accumulation=4),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5e:4x8"),
    )
