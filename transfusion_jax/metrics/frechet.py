"""The Frechet distance of two sets of features: the FID where the features are Inception-v3's."""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features [n, f].

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))    (Heusel et al. 2017, equation 6)

    tr (A B)^(1/2) is the sum of the singular values of the product of square roots of A and B; that
    avoids the root of a product that is not symmetric.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # The triangle of a QR decomposition of centred features is a root of their covariance:
    # A = R^T R.
    root_a, root_b = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b))
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    traces = (root_a**2).sum() + (root_b**2).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross)
