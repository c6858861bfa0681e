"""Picture files to and from the arrays that the model sees."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from transfusion_jax.config import ImageConfig

MODES = {1: "L", 3: "RGB"}


def read_image(path: Path, config: ImageConfig) -> np.ndarray:
    """A picture file as float32 [h, w, c] in [-1, 1]: black -1, white 1; centre crop, antialiased resize.

    Raises:
      ValueError: the file cannot be read, or the model's images are not pixels.
    """
    if config.channels not in MODES:
        raise ValueError(f"images of {config.channels} channels are no pixels; they need an autoencoder")
    try:
        with Image.open(path) as file:
            picture = file.convert(MODES[config.channels])
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the image {path}: {' '.join(str(error).split())}") from error
    scale = min(picture.width / config.width, picture.height / config.height)
    width, height = config.width * scale, config.height * scale
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    box = (left, top, left + width, top + height)
    picture = picture.resize(
        (config.width, config.height), Image.Resampling.BOX if scale >= 1 else Image.Resampling.BICUBIC, box=box
    )
    return np.asarray(picture, np.float32).reshape(config.shape) / 127.5 - 1.0


def to_uint8(image_hwc: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 ... 255; a single channel is dropped."""
    pixels = np.round((np.clip(image_hwc, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def write_image(path: Path, image_hwc: np.ndarray) -> None:
    """Writes an image in [-1, 1] at its own size; the ending of `path` says in which format."""
    if image_hwc.shape[-1] not in MODES:
        raise ValueError(f"images of {image_hwc.shape[-1]} channels are no pixels; they need an autoencoder")
    Image.fromarray(to_uint8(image_hwc)).save(path)
