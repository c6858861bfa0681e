"""Ready autoencoders on disk: the published `AutoencoderKL` weights in diffusers' layout, and our own.

    PATH/config.json  PATH/diffusion_pytorch_model.safetensors    diffusers (Stable Diffusion 1 to 3, XL, FLUX)
    PATH/config.json  PATH/weights.safetensors                    `save_codec`

Our config.json holds the fields of `AutoencoderConfig`, `scale` and `shift`; our tensors are the parameters under their
dotted names. Published kernels are [out, in, height, width], ours [height, width, in, out].
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

from transfusion_jax.autoencoder.config import AutoencoderConfig
from transfusion_jax.autoencoder.vae import abstract_autoencoder
from transfusion_jax.errors import require

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
PUBLISHED_WEIGHTS = tuple(
    f"diffusion_pytorch_model{kind}.safetensors" for kind in ("", ".fp16", ".bf16")
)

# Diffusers' defaults, for what a published config.json leaves out.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (64,), "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "act_fn": "silu",
    "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None,
    "latents_std": None, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip

# Our name of a module, and the published one.
RENAMES = {
    ".downsample.": ".downsamplers.0.conv.",
    ".upsample.": ".upsamplers.0.conv.",
    ".mid_block.attention.": ".mid_block.attentions.0.",
    ".to_out.": ".to_out.0.",
}
# The attention's parts in checkpoints of 2022 and 2023, and what they are called since.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


@dataclass(frozen=True, eq=False)
class Codec:
    """A trained autoencoder. A model is fed `(latents - shift) * scale`."""

    path: Path
    config: AutoencoderConfig
    graph: nnx.GraphDef
    parameters: dict
    scale: float
    shift: float
    digest: str
    """SHA-256 of configuration and weights: the same in either layout, another for any other autoencoder."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (h, w, c) of the latents of an image of height x width pixels.

        Raises:
          ValueError: the downsampling does not divide the size.
        """
        factor = self.config.downsampling
        require(
            height % factor == 0 and width % factor == 0,
            f"the autoencoder in {self.path} reduces by {factor}, which does not divide {height}x{width} pixels",
        )
        return height // factor, width // factor, self.config.latent_channels

    def encode(self, images_BHWC: ArrayLike) -> tuple[Array, Array]:
        """Mean and standard deviation [B, h, w, c] of the latents of images in [-1, 1], neither scaled nor shifted.

        A "vq" autoencoder gives its codes' vectors and deviations of 0.

        Raises:
          ValueError: the autoencoder does not take images of this size or number of channels.
        """
        images = jnp.asarray(images_BHWC, jnp.float32)
        self.latent_shape(*images.shape[1:3])
        require(
            images.shape[3] == self.config.channels,
            f"the autoencoder in {self.path} takes {self.config.channels} channels, not {images.shape[3]}",
        )
        return self._encode(self.parameters, images)

    def decode(self, latents_Bhwc: ArrayLike) -> Array:
        """Images [B, H, W, C], clipped to [-1, 1], of latents that are neither scaled nor shifted."""
        return self._decode(self.parameters, jnp.asarray(latents_Bhwc, jnp.float32))

    def image(self, picture_HWC: np.ndarray) -> np.ndarray:
        """The latent [h, w, c], its mean, of a picture in [-1, 1] as a model is fed it."""
        return (np.asarray(self.encode(picture_HWC[None])[0][0]) - self.shift) * self.scale

    def picture(self, image_hwc: np.ndarray) -> np.ndarray:
        """The picture [H, W, C] in [-1, 1] of a latent as a model is fed it."""
        return np.asarray(self.decode(image_hwc[None] / self.scale + self.shift))[0]

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
    def _decode(self):
        def decode(parameters, latents):
            with jax.default_matmul_precision("float32"):
                return jnp.clip(nnx.merge(self.graph, parameters).decode(latents), -1.0, 1.0)

        return jax.jit(decode)


def load_codec(path: Path) -> Codec:
    """The autoencoder in a directory, in either layout.

    Raises:
      ValueError: there is none, it is of another kind, or it is damaged.
    """
    path = Path(path)
    require(path.is_dir(), f"no such directory: {path}")
    file = path / CONFIG
    hint = f"; did you mean {path / 'vae'}?" if (path / "vae" / CONFIG).is_file() else ""
    require(file.is_file(), f"no {CONFIG} in {path}{hint}")
    try:
        raw = json.loads(file.read_text())
        require(isinstance(raw, dict), "it must hold a JSON object")
        published = "_class_name" in raw
        config, scale, shift = _published_config(raw) if published else _own_config(raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not describe an autoencoder: {error}") from None
    graph, abstract = abstract_autoencoder(config)
    leaves = traverse_util.flatten_dict(nnx.to_pure_dict(abstract))
    shapes = {_dotted(place): leaf.shape for place, leaf in leaves.items()}
    tensors = (_published_tensors if published else _own_tensors)(path, shapes)
    parameters = traverse_util.unflatten_dict(
        {place: jnp.asarray(tensors[_dotted(place)]) for place in leaves}
    )
    return Codec(
        path, config, graph, parameters, scale, shift, _digest(config, scale, shift, tensors)
    )


def save_codec(
    directory: Path,
    config: AutoencoderConfig,
    parameters: dict | nnx.State,
    scale: float,
    shift: float,
) -> None:
    """Writes a directory that `load_codec` reads; the same autoencoder gives the same bytes.

    What is there before is replaced when both files are written; a config.json never stands beside other weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pure = nnx.to_pure_dict(parameters) if isinstance(parameters, nnx.State) else parameters
    leaves = jax.device_get(traverse_util.flatten_dict(pure))
    tensors = {
        _dotted(place): np.ascontiguousarray(leaf, np.float32) for place, leaf in leaves.items()
    }
    fields = {**dataclasses.asdict(config), "scale": float(scale), "shift": float(shift)}
    weights, description = directory / f"{WEIGHTS}.partial", directory / f"{CONFIG}.partial"
    weights.write_bytes(safetensors.numpy.save(dict(sorted(tensors.items()))))
    description.write_text(json.dumps(fields, indent=2) + "\n")
    (directory / CONFIG).unlink(missing_ok=True)
    weights.replace(directory / WEIGHTS)
    description.replace(directory / CONFIG)


def _dotted(place: tuple) -> str:
    return ".".join(map(str, place))


def _digest(
    config: AutoencoderConfig, scale: float, shift: float, tensors: Mapping[str, np.ndarray]
) -> str:
    fields = {**dataclasses.asdict(config), "scale": scale, "shift": shift}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor, "<f4").reshape(-1).data)
    return digest.hexdigest()


def _own_config(raw: dict[str, Any]) -> tuple[AutoencoderConfig, float, float]:
    names = {field.name for field in dataclasses.fields(AutoencoderConfig)} | {"scale", "shift"}
    missing, unknown = sorted(names - raw.keys()), sorted(raw.keys() - names)
    require(
        not missing and not unknown,
        f"missing fields {missing}, unknown fields {unknown}, and no _class_name",
    )
    scale, shift = float(raw["scale"]), float(raw["shift"])
    fields = {name: value for name, value in raw.items() if name not in ("scale", "shift")}
    return (
        AutoencoderConfig(**{**fields, "multipliers": tuple(fields["multipliers"])}),
        scale,
        shift,
    )


def _published_config(raw: dict[str, Any]) -> tuple[AutoencoderConfig, float, float]:
    require(
        raw["_class_name"] == "AutoencoderKL",
        f"_class_name={raw['_class_name']!r} is not 'AutoencoderKL'",
    )
    raw = PUBLISHED_DEFAULTS | raw
    widths = raw["block_out_channels"]
    for name, known in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        other = [block for block in raw[name] if block != known]
        require(not other, f"{name} has {', '.join(map(repr, other))}; only {known!r} is known")
        require(
            len(raw[name]) == len(widths),
            f"{name}={raw[name]} and block_out_channels={widths} differ in length",
        )
    require(raw["act_fn"] in ("silu", "swish"), f"act_fn={raw['act_fn']!r} is not 'silu'")
    for one, two in (("in_channels", "out_channels"), ("use_quant_conv", "use_post_quant_conv")):
        require(raw[one] == raw[two], f"{one}={raw[one]} and {two}={raw[two]} differ")
    for name in ("latents_mean", "latents_std"):
        require(
            raw[name] is None,
            f"{name}={raw[name]} is not supported, only scaling_factor and shift_factor",
        )
    side, unit = raw["sample_size"], math.gcd(*widths)
    config = AutoencoderConfig(
        size=side if isinstance(side, int) else min(side),
        channels=raw["in_channels"],
        latent_channels=raw["latent_channels"],
        width=unit,
        multipliers=tuple(width // unit for width in widths),
        groups=raw["norm_num_groups"],
        blocks=raw["layers_per_block"],
        middle_attention=raw["mid_block_add_attention"],
        encoder_attention=False,
        latent_projection=raw["use_quant_conv"],
    )
    return config, float(raw["scaling_factor"]), float(raw["shift_factor"] or 0.0)


def _own_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    tensors = _read(path / WEIGHTS)
    _check(path / WEIGHTS, tensors, shapes)
    return tensors


def _published_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Published weights under our names and in our layout."""
    file = next(
        (path / name for name in PUBLISHED_WEIGHTS if (path / name).is_file()),
        path / PUBLISHED_WEIGHTS[0],
    )
    tensors = dict(_modern(name, tensor) for name, tensor in _read(file).items())
    names = {name: _published_name(name) for name in shapes}
    published = {names[name]: _published_shape(shape) for name, shape in shapes.items()}
    _check(file, tensors, published)
    ours = {name: tensors[names[name]] for name in shapes}
    return {name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T for name, x in ours.items()}


def _published_name(name: str) -> str:
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    stem, leaf = name.rsplit(".", 1)
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _modern(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor as diffusers stores it today: attention under its new names, and as linear maps, not convolutions."""
    if ".attentions." not in name:
        return name, tensor
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name, tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor


def _read(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, in float32."""
    if not file.is_file():
        other = sorted(
            x.name for x in file.parent.iterdir() if x.suffix in (".bin", ".pt", ".ckpt", ".pth")
        )
        raise ValueError(
            f"no {file.name} in {file.parent}"
            + (f"; {', '.join(other)} cannot be read" if other else "")
        )
    try:
        with safetensors.safe_open(file, framework="flax") as reader:  # NumPy alone has no bfloat16
            return {name: np.asarray(reader.get_tensor(name), np.float32) for name in reader.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _check(
    file: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless the file has exactly the tensors of the configuration beside it."""
    wrong = [
        f"{name} {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unknown": sorted(tensors.keys() - shapes.keys()),
        "of another shape": sorted(wrong),
    }
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    require(
        not faults,
        f"the tensors of {file} are not those that its {CONFIG} describes: {'; '.join(faults)}",
    )
