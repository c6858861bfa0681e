"""Transfusion 7B with linear 2x2 patches: the controlled setting of section 4.1, size from Table 2.

    transfusion-jax train experiments/transfusion_7b.py

Data: the `synthetic` source, noise with the lengths of web data, until `data.sources` names real ones.
Hardware: v5p:4x4x4, 64 chips, as `transfusion-jax plan` of this file has it (docs/scaling.md); not trained here.
Published (Table 7; C4 PPL / Wiki PPL / Llama acc / CIDEr / FID / CLIP): 7.7 / 4.3 / 61.5 / 27.2 / 18.6 / 25.9.
"""

from dataclasses import replace

from transfusion_jax.config import Experiment, MeshConfig, paper


def config() -> Experiment:
    return replace(paper("7B"), mesh=MeshConfig(data=1, fsdp=-1, topology="v5p:4x4x4"))
