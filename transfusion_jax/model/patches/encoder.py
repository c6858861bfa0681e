"""What the transformer asks of the layers between it and the images."""

from typing import Any, Protocol

from jax import Array


class PatchEncoder(Protocol):
    """Layers before and after the transformer; for each image it sees P vectors of width D."""

    def encode(self, noisy_BMhwc: Array, t_BM: Array) -> tuple[Array, Any]:
        """Noisy images and their timesteps.

        Returns:
          Vectors [B, M, P, D], and what `decode` needs beside the transformer's output: a pytree of
          arrays that start with B and M, such as a U-Net's skips, or None.
        """

    def decode(self, hidden_BMPD: Array, carried: Any) -> Array:
        """The transformer's output for the patches, and what `encode` returned for them.

        Returns:
          The prediction [B, M, h, w, c], in float32.
        """

    def multiplications(self) -> dict[str, int]:
        """As `Model.multiplications`: of each "patch" and of each "image"."""
