"""The variety of drawn pictures, beside that of real ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfusion_jax.metrics.diversity import nearest_distances, within_class_spread


@dataclass(frozen=True)
class Pictures:
    """Pictures [h, w, c] of one size, and the class of each."""

    images: Sequence[np.ndarray | None]
    """None: none came."""
    classes: Sequence[int | str]

    def present(self) -> tuple[np.ndarray, np.ndarray]:
        """The pictures that came [n, h, w, c], and their classes [n]."""
        found = [number for number, image in enumerate(self.images) if image is not None]
        images = [self.images[number] for number in found]
        return np.stack(images) if found else np.zeros(0), np.asarray(self.classes)[found]


def variety(drawn: Pictures, held_out: Pictures, training: np.ndarray) -> dict:
    """How varied drawn pictures are, and how near to `training` pictures; None where unknown.

    `drawn_spread`, `real_spread`: standard deviation within a class of drawn and of held-out
    pictures (0: always the same picture). `nearest_training_drawn`, `nearest_training_held_out`:
    mean distance to the nearest of `training_pictures` (0: copies). Units and definitions:
    `metrics.diversity`.
    """
    scores = {}
    for name, part in (("drawn", drawn), ("real", held_out)):
        images, classes = part.present()
        scores[f"{name}_spread"] = within_class_spread(images, classes)
    for name, part in (("drawn", drawn), ("held_out", held_out)):
        images, _ = part.present()
        known = len(images) > 0 and len(training) > 0
        distance = float(nearest_distances(images, training).mean()) if known else None
        scores[f"nearest_training_{name}"] = distance
    return {**scores, "training_pictures": len(training)}
