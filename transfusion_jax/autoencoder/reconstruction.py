"""How close reconstructions come to their pictures: PSNR, SSIM, a Frechet distance, and a picture to look at."""

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from transfusion_jax.data.images import write_image

RANGE = 2.0  # of values in [-1, 1]


def psnr(image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Peak signal-to-noise ratio of every picture [B], in dB, after clipping to [-1, 1]; at most 100."""
    error = image_Bhwc - jnp.clip(reconstruction_Bhwc, -1.0, 1.0)
    return 10.0 * jnp.log10(RANGE**2 / jnp.maximum(jnp.mean(error * error, axis=(1, 2, 3)), RANGE**2 * 1e-10))


def ssim(image_Bhwc: Array, reconstruction_Bhwc: Array) -> Array:
    """Structural similarity of every picture [B], its mean over places and channels (Wang et al. 2004, equation 13).

    Gaussian window of 11x11, sigma 1.5; K1 = 0.01, K2 = 0.03; only where the window lies inside the picture. For
    smaller pictures the window shrinks to the largest odd side that fits.
    """
    sides = image_Bhwc.shape[1:3]
    half = min(5, (min(sides) - 1) // 2)
    window = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * 1.5**2))
    window = jnp.asarray(window / window.sum(), jnp.float32)

    def blur(x: Array) -> Array:
        """The window's mean at every place, one axis after the other."""
        x = sum(w * x[:, i : i + sides[0] - 2 * half] for i, w in enumerate(window))
        return sum(w * x[:, :, i : i + sides[1] - 2 * half] for i, w in enumerate(window))

    x, y = image_Bhwc, jnp.clip(reconstruction_Bhwc, -1.0, 1.0)
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2), axis=(1, 2, 3))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features [n, f] (Heusel et al. 2017, equation 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where tr (A B)^(1/2) is the sum of the singular values of the
    product of square roots of A and B: no root of a product that is not symmetric need be taken.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # The triangle of a QR decomposition of centred features is a square root of their covariance: A = R^T R.
    root_a, root_b = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b))
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    traces = (root_a**2).sum() + (root_b**2).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross)


def compare(
    reconstruct: Callable[[np.ndarray], Array], batches: Iterable[np.ndarray], features: Callable[[Array], Array] | None
) -> dict[str, float]:
    """`psnr` and `ssim`, means over pictures, and with `features` (pictures -> [B, f]) the distance of theirs.

    `reconstruction_fid_lpips` is the Frechet distance of the LPIPS network's pooled features. It has the form of the
    FID and goes down where that does, but it is not comparable to a published FID, which is of Inception-v3's.
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
    if features is not None:
        distance = frechet_distance(np.concatenate(before), np.concatenate(after))
        scores["reconstruction_fid_lpips"] = distance
    return scores


def grid(image_nhwc: np.ndarray, reconstruction_nhwc: np.ndarray, columns: int = 8) -> np.ndarray:
    """Rows of pictures, each with the row of their reconstructions below it, white lines between; [H, W, c]."""
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
