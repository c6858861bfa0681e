"""Picture files to and from the arrays that the model sees."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Of all that Pillow reads; among the others is EPS, which it hands to Ghostscript, an
interpreter."""
MAX_PIXELS = 89_478_485
"""Pictures that claim more pixels are taken for decompression bombs (a quarter of a GiB in RGB, as
Pillow warns)."""


def decode(data: bytes, height: int, width: int, channels: int) -> np.ndarray:
    """An encoded picture as uint8 [height, width, channels]: centre crop, then an antialiased
    resize.

    The largest centred box of the wanted shape is resized with Pillow's bicubic filter, its support
    widened by the reduction (so it averages, not skips); one more than six times too large is first
    averaged over whole pixels (`reducing_gap`), and a JPEG while it is decoded. The camera's
    orientation is applied, and what is transparent becomes white.

    Raises:
      ValueError: one short reason, such as "truncated image".
    """
    if not data:
        raise ValueError("empty image file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError("decompression bomb")
            file.draft(None, (6 * max(height, width),) * 2)
            ImageOps.exif_transpose(file, in_place=True)
            picture = _flat(file, MODES[channels])
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError("decompression bomb") from error
    except UnidentifiedImageError as error:
        raise ValueError("not an image") from error
    except ValueError as error:
        raise ValueError(
            "decompression bomb" if "bomb" in str(error) else "corrupt image"
        ) from error
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(
            "truncated image" if "truncated" in str(error) else "corrupt image"
        ) from error
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - width * scale) / 2, (picture.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(picture, np.uint8).reshape(height, width, channels)


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, on white where it is transparent; 16 bits become 8."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def read_image(path: Path, height: int, width: int, channels: int) -> np.ndarray:
    """A picture file as float32 [height, width, channels] in [-1, 1], black -1, white 1; resized as
    by `decode`.

    Raises:
      ValueError: the file cannot be read, or pictures have another number of channels.
    """
    if channels not in MODES:
        raise ValueError(f"images of {channels} channels are no pixels; they need an autoencoder")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot read the image {path}: it is not a regular file")
    try:
        return from_uint8(decode(path.read_bytes(), height, width, channels))
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """0 ... 255 to float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_uint8(image_hwc: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 ... 255; a single channel is dropped."""
    pixels = np.round((np.clip(image_hwc, -1, 1) + 1) * 127.5).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def write_image(path: Path, image_hwc: np.ndarray) -> None:
    """Writes an image in [-1, 1] at its own size; the ending of `path` says in which format."""
    if image_hwc.shape[-1] not in MODES:
        raise ValueError(
            f"images of {image_hwc.shape[-1]} channels are no pixels; they need an autoencoder"
        )
    Image.fromarray(to_uint8(image_hwc)).save(path)
