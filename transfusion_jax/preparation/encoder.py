"""The autoencoder that turns pictures into latents, on all devices of this process."""

import dataclasses
import functools
import math

import numpy as np

from transfusion_jax.autoencoder.codec import Codec, load_codec
from transfusion_jax.data.sources.records import id_type
from transfusion_jax.errors import require
from transfusion_jax.files import local_path
from transfusion_jax.preparation.config import Preparation
from transfusion_jax.preparation.shards import ENCODED, Encode


def codec_of(preparation: Preparation) -> Codec:
    """The autoencoder that a preparation names.

    Raises:
      ValueError: it cannot be read, or does not take such pictures.
    """
    path = local_path(preparation.autoencoder)
    trained = path / "autoencoder"  # in the run directory of `transfusion-jax autoencoder`
    codec = load_codec(trained if trained.is_dir() else path)
    codec.latent_shape(preparation.height, preparation.width)
    require(
        codec.config.channels == preparation.channels,
        f"the autoencoder takes {codec.config.channels} channels, "
        f"not channels={preparation.channels}",
    )
    return codec


def encoder_of(codec: Codec) -> Encode:
    """Encodes batches that are split over all devices of this process, each with the weights: to
    posteriors, or to the codes of a VQ autoencoder."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()[: math.gcd(ENCODED, jax.local_device_count())]
    place = functools.partial(NamedSharding, Mesh(devices, ("images",)))
    codec = dataclasses.replace(
        codec, parameters=jax.device_put(codec.parameters, place(PartitionSpec()))
    )

    def codes(pictures: np.ndarray) -> np.ndarray:
        found = codec.codes(jax.device_put(pictures, place(PartitionSpec("images"))))
        return np.asarray(found).astype(id_type(codec.config.codes))

    def encode(pictures: np.ndarray) -> np.ndarray:
        mean, std = codec.encode(jax.device_put(pictures, place(PartitionSpec("images"))))
        return np.stack([np.asarray(mean), np.asarray(std)], axis=1).astype(np.float16)

    return codes if codec.config.kind == "vq" else encode
