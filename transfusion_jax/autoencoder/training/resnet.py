"""ResNet-50 (He et al. 2016, arXiv 1512.03385) as a pure function over weights in torch's layout,
to compare pictures.

The ID term of the loss asks a network trained without labels, MoCo v2 (Chen et al. 2020, arXiv
2003.04297), whether two pictures show the same thing. The paper gives no formula; ours is 1 -
cosine of the 2,048 pooled features, because MoCo's contrastive loss trains nothing but their
angles.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load_file

Weights = dict[str, dict[str, Array]]

STAGES = (3, 4, 6, 3)
# ImageNet's mean and deviation for pictures in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-5  # torch's batch norm
CONVERSION = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file(torch.load(sys.argv[1], weights_only=True)['state_dict'], sys.argv[2])\" "
    "moco.pth.tar moco.safetensors"
)


def load_resnet(path: Path) -> Weights:
    """Weights of MoCo v2 from a safetensors file with the names of its torch checkpoint.

    The prefix `module.encoder_q.` is dropped, and so is the projection `fc`. Every batch norm
    becomes the scale and shift that it is at evaluation.

    Raises:
      ValueError: the file is missing, or it does not hold a ResNet-50.
    """
    if not path.is_file():
        raise ValueError(f"loss.identity_weights: there is no file {path}")
    arrays = _read(path)
    if any("encoder_q." in name for name in arrays):
        arrays = {name: x for name, x in arrays.items() if "encoder_q." in name}
    arrays = {re.sub(r"^(module\.)?(encoder_q\.)?", "", name): x for name, x in arrays.items()}
    weights = {}
    for convolution, norm, shape in _layers():
        try:
            kernel = arrays[f"{convolution}.weight"]
            gamma, beta, mean, variance = (
                arrays[f"{norm}.{part}"]
                for part in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ValueError(
                f"{path} does not hold a ResNet-50: it lacks {error.args[0]}"
            ) from None
        if kernel.shape != shape:
            raise ValueError(
                f"{path} does not hold a ResNet-50: {convolution}.weight has {kernel.shape}, "
                f"not {shape}"
            )
        scale = gamma / np.sqrt(variance + np.float32(EPSILON))
        parts = {
            "kernel": kernel.transpose(2, 3, 1, 0),
            "scale": scale,
            "shift": beta - mean * scale,
        }
        weights[convolution] = {
            name: jnp.asarray(part, jnp.float32) for name, part in parts.items()
        }
    return weights


def features(weights: Weights, image_Bhwc: Array) -> Array:
    """Pooled features [B, 2048] of pictures in [-1, 1], of any size; grey ones become RGB."""
    x = (jnp.broadcast_to(image_Bhwc, (*image_Bhwc.shape[:3], 3)) + 1.0) / 2.0
    x = (x - jnp.asarray(MEAN)[None, None, None]) / jnp.asarray(DEVIATION)[None, None, None]
    x = jax.nn.relu(_layer(weights["conv1"], x, 2))
    x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    for stage, blocks in enumerate(STAGES, 1):
        for block in range(blocks):
            x = _bottleneck(
                weights, f"layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1
            )
    return jnp.mean(x, axis=(1, 2))


def identity(weights: Weights, image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """1 - cosine of the features of the two pictures [B]."""
    a, b = (_unit(features(weights, x)) for x in (image_Bhwc, reconstruction_Bhwc))
    return 1.0 - jnp.sum(a * b, axis=-1)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _bottleneck(weights: Weights, name: str, x: Array, stride: int) -> Array:
    """1x1, 3x3, 1x1 around a shortcut; the stride is the 3x3's, as in torchvision and MoCo."""
    y = jax.nn.relu(_layer(weights[f"{name}.conv1"], x, 1))
    y = jax.nn.relu(_layer(weights[f"{name}.conv2"], y, stride))
    y = _layer(weights[f"{name}.conv3"], y, 1)
    shortcut = weights.get(f"{name}.downsample.0")
    return jax.nn.relu(y + (x if shortcut is None else _layer(shortcut, x, stride)))


def _layer(layer: dict[str, Array], x: Array, stride: int) -> Array:
    """A convolution and its frozen batch norm."""
    half = layer["kernel"].shape[0] // 2
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        ((half, half),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x * layer["scale"][None, None, None] + layer["shift"][None, None, None]


def _layers() -> list[tuple[str, str, tuple[int, ...]]]:
    """Names of every convolution and its batch norm, and its weight's shape in torch's order."""
    layers, before = [("conv1", "bn1", (64, 3, 7, 7))], 64
    for stage, blocks in enumerate(STAGES, 1):
        inner = 32 * 2**stage
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes = ((inner, before, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1))
            layers += [
                (f"{name}.conv{i}", f"{name}.bn{i}", shape) for i, shape in enumerate(shapes, 1)
            ]
            if block == 0:
                layers.append(
                    (f"{name}.downsample.0", f"{name}.downsample.1", (4 * inner, before, 1, 1))
                )
            before = 4 * inner
    return layers


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, by name."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"loss.identity_weights: {path} is no safetensors file; a torch checkpoint is a pickle "
            f"that may run any code when it is read: convert one that you trust: {CONVERSION}"
        )
    try:
        return load_file(path)
    except Exception as error:  # the package has its own kind of error
        raise ValueError(f"cannot read {path}: {error}") from error
