"""The letter legend: the dimensions in array names, einsums and annotations.

    B  rows of a batch                       N  query heads
    L  positions of a row                    K  key and value heads (K divides N; N = G * K)
    S  positions of the keys (cache or row)  G  query heads that share a key head
    T  positions added to a cache            H  width of one head
    D  width of the model                    F  width of the feed-forward layer
    M  image slots of a row                  V  rows of the vocabulary
    P  patches of one image                  Z  values of one patch (patch * patch * c)
    Q  patches of all slots of a row: M * P  C  chunks of something longer
    E  width of a U-Net's timestep
    h w c  grid and channels of an image     z  channels of an autoencoder's latent
    H W C  grid and channels of a picture in pixels, where `h w c` are its latent's

Arrays carry their dimensions in their name: `tokens_BL`, `q_BLNH`, `latents_BMhwc`. A file that
needs another letter, or another meaning of one, says so at its top.
The aliases below are for public boundaries; tests check them at run time.
"""

from jax import Array
from jaxtyping import Float, Int

BL = Int[Array, "B L"]
BM = Int[Array, "B M"]
FloatBL = Float[Array, "B L"]
FloatBM = Float[Array, "B M"]
BLD = Float[Array, "B L D"]
BMhwc = Float[Array, "B M h w c"]
BLNH = Float[Array, "B L N H"]
BSKH = Float[Array, "B S K H"]
Scalar = Float[Array, ""]
