"""What all figures share: colours, pictures on axes, wrapped text, saving."""

import textwrap
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase

from transfusion_jax.files import atomic_path
from transfusion_jax.images import to_uint8

INK, MUTED, ACCENT, RIGHT = "#1f2430", "#8a8f98", "#b3202c", "#2f7d55"


def check_format(path: Path) -> None:
    """Raises ValueError unless figures can be written to a file with this ending."""
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path} must end in one of .{', .'.join(known)}")


def save(figure: plt.Figure, path: Path, dpi: int) -> None:
    """Writes a figure atomically; letters that the font lacks are boxes, without a warning each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
    plt.close(figure)


def show(axes: plt.Axes, picture: np.ndarray) -> None:
    """A picture in [-1, 1]; one channel is drawn as grey."""
    axes.imshow(to_uint8(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def frame(axes: plt.Axes, colour: str | None) -> None:
    """Draws a frame of this colour around a picture; None: no frame."""
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour or INK, linewidth=1.5)


def wrapped(text: str, width: int, lines: int) -> str:
    """At most so many lines of so many characters; dollar signs are shown, not read as maths."""
    kept = textwrap.wrap(" ".join(text.split()), width)[: lines + 1]
    if len(kept) > lines:
        kept = [*kept[: lines - 1], kept[lines - 1][: width - 1] + "…"]
    return "\n".join(kept).replace("$", r"\$")
