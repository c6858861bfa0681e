"""Loss curves of a run, as a picture."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from transfusion_jax.figures import INK, MUTED, save
from transfusion_jax.training.metrics import read_metrics


def curves(run_dir: Path, path: Path) -> None:
    """Text and image loss over the steps, smoothed line over the raw one; of a model that has no
    loss of a name, nothing."""
    rows = read_metrics(run_dir)
    steps = np.asarray([row["step"] for row in rows])
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, name, title in zip(
        panels, ("text_loss", "image_loss"), ("text loss (nats)", "image loss"), strict=True
    ):
        values = np.asarray([row[name] for row in rows], float)
        axes.set(title=title, xlabel="step")
        if values.any():
            axes.plot(steps, values, color=MUTED, linewidth=0.6, alpha=0.6)
            axes.plot(steps, _smooth(values), color=INK, linewidth=1.6)
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, 150)


def _smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Mean over a centred window of a share of the points."""
    half = max(int(len(values) * share), 1)
    return np.asarray([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])
