"""Diversity of drawn pictures: how they differ from each other and from training pictures.

A model that draws the same picture each time, or copies of what it was trained on, can pass for
perfect in any score of single pictures. The first has a spread of 0, the second a distance of 0.
Both measures are in the units of the pictures' values and should be read beside the same measure of
real pictures that were not trained on. A copy with noise is as far away as an unseen picture: its
spread is then above that of real ones, which is as bad as below.
"""

import numpy as np

BLOCK = 1024
"""Training pictures compared at one time."""


def within_class_spread(pictures_nhwc: np.ndarray, classes_n: np.ndarray) -> float | None:
    """Standard deviation within a class (n - 1), averaged over values and over classes.

    Classes count equally; those of a single picture do not count. None if no class has two.
    """
    spreads = [
        pictures_nhwc[classes_n == c].std(0, ddof=1, dtype=np.float64).mean()
        for c in np.unique(classes_n)
        if (classes_n == c).sum() > 1
    ]
    return float(np.mean(spreads)) if spreads else None


def nearest_distances(pictures_nhwc: np.ndarray, references_mhwc: np.ndarray) -> np.ndarray:
    """Root mean square difference of every picture from its nearest reference, float64 [n].

    0 for a copy. Nearest is meant in this distance itself: a copy that is shifted by a pixel is not
    near.
    """
    pictures, references = (
        np.asarray(x, np.float32).reshape(len(x), -1) for x in (pictures_nhwc, references_mhwc)
    )
    least = np.full(len(pictures), np.inf)
    nearest = np.zeros(len(pictures), int)
    for start in range(0, len(references), BLOCK):
        block = references[start : start + BLOCK]
        # |p - r|^2 less |p|^2, which is the same for all references
        distance = (block**2).sum(1)[None, :] - 2 * pictures @ block.T
        found = distance.argmin(1)
        smallest = distance[np.arange(len(pictures)), found]
        nearest = np.where(smallest < least, start + found, nearest)
        least = np.minimum(smallest, least)
    # Again, from the difference itself: the sums above cancel badly for copies.
    difference = pictures.astype(np.float64) - references[nearest]
    return np.sqrt((difference**2).mean(1))
