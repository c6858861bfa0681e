"""The letter legend: every dimension in this package is one of these, in names, einsums and annotations.

    B  rows of a batch                       N  query heads
    L  positions of a row                    K  key and value heads (K divides N; N = G * K)
    S  positions of the keys (cache or row)  H  width of one head
    T  positions added to a cache            F  width of the feed-forward layer
    D  width of the model                    V  rows of the vocabulary
    M  image slots of a row                  P  patches of one image
    h w c  grid and channels of an image     Z  values of one patch (patch * patch * c)

Arrays carry their dimensions in their name: `tokens_BL`, `q_BLNH`, `latents_BMhwc`.
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
