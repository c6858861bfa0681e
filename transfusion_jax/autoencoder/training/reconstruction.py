"""How close reconstructions come to their pictures, in numbers and as a picture."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.images import write_image
from transfusion_jax.metrics.frechet import frechet_distance
from transfusion_jax.metrics.psnr import psnr
from transfusion_jax.metrics.ssim import ssim


def compare(
    reconstruct: Callable[[np.ndarray], Array],
    batches: Iterable[np.ndarray],
    features: Callable[[Array], Array] | None,
) -> dict[str, float]:
    """`psnr` and `ssim`, means over pictures, and with `features` (pictures -> [B, f]) the distance
    of theirs.

    `reconstruction_fid_lpips` is the Frechet distance of the LPIPS network's pooled features. It
    has the form of the FID and goes down where that does, but it is not comparable to a published
    FID, which is of Inception-v3's. One picture has no such distance.
    """
    measures = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}
    found: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    before, after = [], []
    for image in batches:
        reconstruction = jnp.clip(reconstruct(image), -1.0, 1.0)
        for name, measure in measures.items():
            found[name].append(np.asarray(measure(image, reconstruction)))
        if features is not None:
            before.append(np.asarray(features(image)))
            after.append(np.asarray(features(reconstruction)))
    scores = {name: float(np.mean(np.concatenate(values))) for name, values in found.items()}
    if sum(map(len, before)) > 1:
        distance = frechet_distance(np.concatenate(before), np.concatenate(after))
        scores["reconstruction_fid_lpips"] = distance
    return scores


def grid(image_nhwc: np.ndarray, reconstruction_nhwc: np.ndarray, columns: int = 8) -> np.ndarray:
    """Rows of pictures, each with the row of their reconstructions below it, white lines between;
    [H, W, c]."""
    n, h, w, c = image_nhwc.shape
    scale = max(1, 96 // h)  # small pictures are shown larger
    rows = []
    for at in range(0, n, columns):
        for pictures in (image_nhwc, reconstruction_nhwc):
            row = np.ones((columns, h, w, c), np.float32)
            row[: min(columns, n - at)] = pictures[at : at + columns]
            row = row.repeat(scale, 1).repeat(scale, 2)
            row = np.pad(row, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1.0)
            rows.append(np.concatenate(list(row), axis=1))
    return np.concatenate(rows)


def write_grid(path: Path, image_nhwc: np.ndarray, reconstruction_nhwc: np.ndarray) -> None:
    """The grid as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, grid(image_nhwc, np.asarray(reconstruction_nhwc)))
