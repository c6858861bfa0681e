"""Linear patches: one linear layer from a patch to a vector, and one back (section 3.2)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.config import ImageConfig, ModelConfig
from transfusion_jax.model.layers import added, parameter, project
from transfusion_jax.model.patches import timestep
from transfusion_jax.model.patches.grid import patchify, unpatchify

POSITION_SCALE = 0.5
"""Of learned positions: half the size of the encoded content of a patch of unit variance, and so
neither drowns the other."""


class LinearPatches(nnx.Module):
    """A `PatchEncoder` of two linear layers and a D-wide MLP for the timestep.

    `model.timestep` says where the timestep goes: "before" adds its Z-wide projection to the patch
    before the linear layer, as in the paper; "after" adds the D-wide embedding to the layer's
    output.
    """

    def __init__(self, config: ModelConfig, image: ImageConfig, *, rngs: nnx.Rngs):
        D, Z, waves = config.width, image.patch_values, timestep.WIDTH
        self.before = config.timestep == "before"
        self.time_in = parameter(rngs.params(), (waves, D), (None, "embed"), waves**-0.5)
        self.time_out_DD = parameter(rngs.params(), (D, D), ("embed", None), D**-0.5)
        if self.before:
            self.time_patch_DZ = parameter(rngs.params(), (D, Z), ("embed", None), D**-0.5)
        self.learned = config.patch_position == "learned"
        if self.learned:
            self.position_PD = parameter(
                rngs.params(), (image.patches, D), (None, "embed"), POSITION_SCALE
            )
        self.in_ZD = parameter(rngs.params(), (Z, D), (None, "embed"), Z**-0.5)
        # At first the prediction is zero.
        self.out_DZ = parameter(rngs.params(), (D, Z), ("embed", None), 0.0)
        self.image = image
        self.dtype = jnp.dtype(config.compute_dtype)

    def encode(self, noisy_BMhwc: Array, t_BM: Array) -> tuple[Array, None]:
        """Patch vectors [B, M, P, D]; nothing is carried around the transformer."""
        waves = timestep.sinusoid(t_BM).astype(self.dtype)
        time_BMD = project(jax.nn.silu(project(waves, self.time_in)), self.time_out_DD)
        patches_BMPZ = patchify(noisy_BMhwc.astype(self.dtype), self.image.patch)
        if self.before:
            time_BMZ = project(jax.nn.silu(time_BMD), self.time_patch_DZ)
            vectors_BMPD = project(added(patches_BMPZ, time_BMZ[:, :, None]), self.in_ZD)
        else:
            vectors_BMPD = added(project(patches_BMPZ, self.in_ZD), time_BMD[:, :, None])
        if self.learned:
            vectors_BMPD = added(vectors_BMPD, self.position_PD[...][None, None])
        return vectors_BMPD, None

    def decode(self, hidden_BMPD: Array, carried: None) -> Array:
        """The prediction [B, M, h, w, c], in float32."""
        patches_BMPZ = project(hidden_BMPD, self.out_DZ)
        return unpatchify(patches_BMPZ, self.image.shape, self.image.patch).astype(jnp.float32)

    def multiplications(self) -> dict[str, int]:
        """The timestep's layers multiply one vector of an image, the others each patch."""
        time = [self.time_in, self.time_out_DD]
        if self.before:
            time.append(self.time_patch_DZ)
        return {
            "patch": math.prod(self.in_ZD.shape) + math.prod(self.out_DZ.shape),
            "image": sum(math.prod(kernel.shape) for kernel in time),
        }
