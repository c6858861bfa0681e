"""A trained autoencoder: its directory on disk, and encoding and decoding with it.

A directory has one of two layouts:

    config.json  weights.safetensors                    ours, written by `save_codec`
    config.json  diffusion_pytorch_model.safetensors    diffusers', see `published.py`

Our config.json holds the fields of `AutoencoderConfig`, `scale` and `shift`. Our tensors are the
parameters, named by their dotted paths.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx, traverse_util
from jax import Array
from jax.typing import ArrayLike

from transfusion_jax.autoencoder import published
from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.config.fields import require_types
from transfusion_jax.errors import require
from transfusion_jax.files import atomic_path

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
PICKLED = (".bin", ".pt", ".ckpt", ".pth")
"""Suffixes of pickled weights, which an error names but nothing opens."""

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Codec:
    """A trained autoencoder; models see its latents as `(latents - shift) * scale`."""

    path: Path
    config: AutoencoderConfig
    graph: nnx.GraphDef
    parameters: dict
    scale: float
    shift: float
    digest: str
    """SHA-256 of configuration, scale, shift and weights. A copy in the other layout has another:
    diffusers' does not keep all of the configuration."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Latent shape (h, w, c) of an image with height x width pixels.

        Raises:
          ValueError: the autoencoder's downsampling does not divide the height or the width.
        """
        factor = self.config.downsampling
        require(
            height % factor == 0 and width % factor == 0,
            f"the autoencoder in {self.path} reduces by {factor}, which does not divide "
            f"{height}x{width} pixels",
        )
        return height // factor, width // factor, self.config.latent_channels

    def encode(self, images_BHWC: ArrayLike) -> tuple[Array, Array]:
        """Mean and standard deviation, [B, h, w, c] each, of the latents of images in [-1, 1].

        The latents are neither scaled nor shifted. For a "vq" autoencoder the mean is the nearest
        codebook entry and the deviation 0.

        Raises:
          ValueError: wrong number of channels, or a size that the downsampling does not divide.
        """
        images = jnp.asarray(images_BHWC, jnp.float32)
        self.latent_shape(*images.shape[1:3])
        require(
            images.shape[3] == self.config.channels,
            f"the autoencoder in {self.path} takes {self.config.channels} channels, not "
            f"{images.shape[3]}",
        )
        return self._encode(self.parameters, images)

    def codes(self, images_BHWC: ArrayLike) -> Array:
        """Code numbers [B, h, w, 1], int32, of images in [-1, 1], for a "vq" autoencoder."""
        return self._codes(self.parameters, jnp.asarray(images_BHWC, jnp.float32))

    def decode(self, latents_Bhwc: ArrayLike) -> Array:
        """Images [B, H, W, C], clipped to [-1, 1]; latents are neither scaled nor shifted."""
        return self._decode(self.parameters, jnp.asarray(latents_Bhwc, jnp.float32))

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        """What a model is shown for a picture in [-1, 1], [h, w, c]: the mean latent, scaled and
        shifted, or the codes of a "vq" autoencoder."""
        if self.config.kind == "vq":
            return np.asarray(self.codes(picture_HWC[None])[0], np.float32)
        mean_Bhwc, _ = self.encode(picture_HWC[None])
        return (np.asarray(mean_Bhwc[0]) - self.shift) * self.scale

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        """The picture [H, W, C] in [-1, 1] of what `image` gives; inverts it."""
        if self.config.kind == "vq":
            return np.asarray(self.decode(self.latent(image_hwc)[None]))[0]
        return np.asarray(self.decode(image_hwc[None] / self.scale + self.shift))[0]

    def latent(self, image_hwc: np.ndarray) -> np.ndarray:
        """An image of `image` as one whose differences mean something: itself, or the codebook
        entries [h, w, latent channels] of its codes."""
        if self.config.kind != "vq":
            return image_hwc
        codebook = np.asarray(self.parameters["quantizer"]["codebook"])
        return codebook[image_hwc[..., 0].astype(np.int32)]

    @functools.cached_property
    def _encode(self):
        def encode(parameters, images):
            model = nnx.merge(self.graph, parameters)
            with jax.default_matmul_precision("float32"):
                if self.config.kind == "vq":
                    latents = model.quantizer.lookup(model.quantizer(model.features(images)).codes)
                    return latents, jnp.zeros_like(latents)
                latents = model.encode(images)
                return latents.mean, jnp.exp(0.5 * latents.log_variance)

        return jax.jit(encode)

    @functools.cached_property
    def _codes(self):
        def codes(parameters, images):
            model = nnx.merge(self.graph, parameters)
            with jax.default_matmul_precision("float32"):
                return model.quantizer(model.features(images)).codes[..., None]

        return jax.jit(codes)

    @functools.cached_property
    def _decode(self):
        def decode(parameters, latents):
            with jax.default_matmul_precision("float32"):
                return jnp.clip(nnx.merge(self.graph, parameters).decode(latents), -1.0, 1.0)

        return jax.jit(decode)


def load_codec(path: Path) -> Codec:
    """Loads the autoencoder in a directory with either layout.

    Raises:
      ValueError: no autoencoder there, an unsupported kind, or damaged files.
    """
    path = Path(path)
    require(path.is_dir(), f"no such directory: {path}")
    file = path / CONFIG
    hint = f"; did you mean {path / 'vae'}?" if (path / "vae" / CONFIG).is_file() else ""
    require(file.is_file(), f"no {CONFIG} in {path}{hint}")
    try:
        raw = json.loads(file.read_text())
        require(isinstance(raw, dict), "not a JSON object")
        foreign = published.is_published(raw)
        config, scale, shift = published.read_config(raw) if foreign else _own_config(raw)
        require_types(config)
        require(0 < scale < math.inf, f"a scale of {scale} cannot be undone")
        require(math.isfinite(shift), f"a shift of {shift} is no finite number")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not describe an autoencoder: {error}") from None
    graph, abstract = abstract_autoencoder(config)
    leaves = traverse_util.flatten_dict(nnx.to_pure_dict(abstract))
    shapes = {_dotted(place): leaf.shape for place, leaf in leaves.items()}
    tensors = _published_tensors(path, shapes) if foreign else _own_tensors(path, shapes)
    parameters = traverse_util.unflatten_dict(
        {place: jnp.asarray(tensors[_dotted(place)]) for place in leaves}
    )
    digest = _digest(config, scale, shift, tensors)
    return Codec(path, config, graph, parameters, scale, shift, digest)


def save_codec(
    directory: Path,
    config: AutoencoderConfig,
    parameters: dict | nnx.State,
    scale: float,
    shift: float,
) -> None:
    """Writes a directory for `load_codec`; equal autoencoders give equal bytes.

    An autoencoder already there is replaced once both new files are written. A process killed
    between the two renames leaves weights without a config.json, never with the wrong one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pure = nnx.to_pure_dict(parameters) if isinstance(parameters, nnx.State) else parameters
    tensors = named(pure)
    fields = {**dataclasses.asdict(config), "scale": float(scale), "shift": float(shift)}
    # Left in reverse order: the weights are renamed first, while there is no config.json.
    with (
        atomic_path(directory / CONFIG) as description,
        atomic_path(directory / WEIGHTS) as weights,
    ):
        weights.write_bytes(safetensors.numpy.save(dict(sorted(tensors.items()))))
        description.write_text(json.dumps(fields, indent=2) + "\n")
        (directory / CONFIG).unlink(missing_ok=True)


def named(parameters: dict) -> Tensors:
    """The arrays of an autoencoder, float32, by their dotted names."""
    leaves = jax.device_get(traverse_util.flatten_dict(parameters))
    return {
        _dotted(place): np.ascontiguousarray(leaf, np.float32) for place, leaf in leaves.items()
    }


def _dotted(place: tuple[str | int, ...]) -> str:
    return ".".join(map(str, place))


def _digest(config: AutoencoderConfig, scale: float, shift: float, tensors: Tensors) -> str:
    fields = {**dataclasses.asdict(config), "scale": scale, "shift": shift}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4").reshape(-1).data)
    return digest.hexdigest()


def _own_config(raw: dict[str, Any]) -> tuple[AutoencoderConfig, float, float]:
    names = {field.name for field in dataclasses.fields(AutoencoderConfig)} | {"scale", "shift"}
    missing = sorted(names - raw.keys())
    unknown = sorted(raw.keys() - names)
    require(
        not missing and not unknown,
        f"missing fields {missing}, unknown fields {unknown}, and no _class_name",
    )
    fields = dict(raw)
    scale = float(fields.pop("scale"))
    shift = float(fields.pop("shift"))
    multipliers = tuple(fields.pop("multipliers"))
    return AutoencoderConfig(**fields, multipliers=multipliers), scale, shift


def _own_tensors(directory: Path, shapes: Shapes) -> Tensors:
    file = directory / WEIGHTS
    tensors = _read(file)
    _check(file, tensors, shapes)
    return tensors


def _published_tensors(directory: Path, shapes: Shapes) -> Tensors:
    """Published weights under our names and in our layout."""
    file = published.weights_file(directory)
    tensors = published.to_current_names(_read(file))
    names = {name: published.tensor_name(name) for name in shapes}
    _check(file, tensors, {names[name]: published.tensor_shape(shapes[name]) for name in shapes})
    return {name: published.to_our_layout(tensors[names[name]]) for name in shapes}


def _read(file: Path) -> Tensors:
    """All tensors of a safetensors file, in float32."""
    if not file.is_file():
        pickled = sorted(x.name for x in file.parent.iterdir() if x.suffix in PICKLED)
        hint = f"; {', '.join(pickled)} cannot be read" if pickled else ""
        raise ValueError(f"no {file.name} in {file.parent}{hint}")
    try:
        # Not framework="numpy": NumPy itself has no bfloat16.
        with safetensors.safe_open(file, framework="flax") as reader:
            return {name: np.asarray(reader.get_tensor(name), np.float32) for name in reader.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _check(file: Path, tensors: Tensors, shapes: Shapes) -> None:
    """Raises ValueError unless the tensors are exactly those of the configuration."""
    misshapen = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - shapes.keys()),
        "of another shape": sorted(misshapen),
    }
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    require(not faults, f"the tensors of {file} do not match its {CONFIG}: {'; '.join(faults)}")
