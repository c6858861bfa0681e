"""Patches: from an image grid to vectors of the transformer and back, with linear layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.config import ImageConfig, ModelConfig
from transfusion_jax.model.layers import parameter, project

TIMESTEP_FREQUENCIES = 256
FASTEST = 0.1  # radians per timestep, so that neighbouring timesteps look alike
POSITION_SCALE = (
    0.5  # half the content of a patch of unit variance, so that the first layer can combine the two
)


def patchify(image: Array, patch: int) -> Array:
    """[..., h, w, c] -> [..., P, Z]: patches left to right, top to bottom; Z runs over rows, columns, channels."""
    *lead, h, w, c = image.shape
    x = image.reshape(*lead, h // patch, patch, w // patch, patch, c)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Array, shape: tuple[int, int, int], patch: int) -> Array:
    """The inverse of `patchify`: [..., P, Z] -> [..., h, w, c]."""
    h, w, c = shape
    lead = patches.shape[:-2]
    x = patches.reshape(*lead, h // patch, w // patch, patch, patch, c)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, h, w, c)


def sinusoid(t_BM: Array, width: int) -> Array:
    """[cos, sin] of t at `width / 2` frequencies from FASTEST down to 1e-4 of it (Vaswani et al. 2017), in float32."""
    half = width // 2
    frequency = FASTEST * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t_BM[..., None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class LinearPatches(nnx.Module):
    """One linear layer in, one out, and a D-wide timestep MLP (section 3.2).

    `model.timestep` says where the timestep goes: "before" adds its Z-wide projection to the patch vector
    before the linear layer, as in the paper; "after" adds the D-wide embedding to the layer's output.
    """

    def __init__(self, config: ModelConfig, image: ImageConfig, *, rngs: nnx.Rngs):
        D, Z = config.width, image.patch_values
        self.before = config.timestep == "before"
        self.time_in = parameter(
            rngs.params(), (TIMESTEP_FREQUENCIES, D), (None, "embed"), TIMESTEP_FREQUENCIES**-0.5
        )
        self.time_out_DD = parameter(rngs.params(), (D, D), ("embed", None), D**-0.5)
        if self.before:
            self.time_patch_DZ = parameter(rngs.params(), (D, Z), ("embed", None), D**-0.5)
        self.learned = config.patch_position == "learned"
        if self.learned:
            self.position_PD = parameter(
                rngs.params(), (image.patches, D), (None, "embed"), POSITION_SCALE
            )
        self.in_ZD = parameter(rngs.params(), (Z, D), (None, "embed"), Z**-0.5)
        self.out_DZ = parameter(
            rngs.params(), (D, Z), ("embed", None), 0.0
        )  # predicts zero noise at first
        self.image = image
        self.dtype = jnp.dtype(config.compute_dtype)

    def encode(self, noisy_BMhwc: Array, t_BM: Array) -> Array:
        """Noisy images and their timesteps -> patch vectors [B, M, P, D]."""
        waves = sinusoid(t_BM, TIMESTEP_FREQUENCIES).astype(self.dtype)
        time_BMD = project(jax.nn.silu(project(waves, self.time_in)), self.time_out_DD)
        patches_BMPZ = patchify(noisy_BMhwc.astype(self.dtype), self.image.patch)
        if self.before:
            time_BMZ = project(jax.nn.silu(time_BMD), self.time_patch_DZ)
            vectors_BMPD = project(patches_BMPZ + time_BMZ[:, :, None], self.in_ZD)
        else:
            vectors_BMPD = project(patches_BMPZ, self.in_ZD) + time_BMD[:, :, None]
        if self.learned:
            vectors_BMPD = vectors_BMPD + self.position_PD[...].astype(self.dtype)[None, None]
        return vectors_BMPD

    def decode(self, hidden_BMPD: Array) -> Array:
        """Hidden states of the patches -> prediction [B, M, h, w, c] in float32."""
        patches_BMPZ = project(hidden_BMPD, self.out_DZ)
        return unpatchify(patches_BMPZ, self.image.shape, self.image.patch).astype(jnp.float32)
