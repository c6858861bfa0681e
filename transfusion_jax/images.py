"""Picture files to and from the arrays that the model sees."""

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Of all that Pillow reads; among the others is EPS, which it hands to Ghostscript, an
interpreter."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its tag of orientation (Exif 2.3, section 4.6.4)."""
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
            picture = _flat(_upright(file), MODES[channels])
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
    # One side is the picture's own: products of rounded ratios can lie outside it.
    box_width = min(picture.width, picture.height * width / height)
    box_height = min(picture.height, picture.width * height / width)
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(picture, np.uint8).reshape(height, width, channels)


def _upright(picture: Image.Image) -> Image.Image:
    """The picture, turned as the camera says; as it is, if what the camera says is damaged.

    `ImageOps.exif_transpose` writes the other tags anew, and fails where one has an odd type.
    """
    picture.load()
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged tags fail in many ways
        return picture
    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, on white where it is transparent; 16 bits become 8."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).clip(0, 65535)
        clear = values == picture.info.get("transparency")
        picture = Image.fromarray(np.where(clear, 255, values // 256).astype(np.uint8))
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
