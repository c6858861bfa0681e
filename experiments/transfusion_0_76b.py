"""Transfusion 0.76B with linear 2x2 patches: the controlled setting of section 4.1.

    transfusion-jax train experiments/transfusion_0_76b.py

Size: Table 2. Data: noise with the lengths of web data (`synthetic`), until you name real ones.
Hardware: v5e:8x8, 64 chips, by `transfusion-jax plan` (docs/scaling.md); not trained here.
Published (Table 7): C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP
    10.4 / 6.0 / 51.7 / 16.0 / 20.3 / 24.0
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    base = paper("0.76B")
    return replace(
        base,
        model=replace(base.model, remat="minimal"),
        train=replace(base.train, accumulation=2),
        mesh=MeshConfig(data=1, fsdp=-1, topology="v5e:8x8"),
    )
