"""The pictures that an autoencoder is trained on; their order is a function of (seed, step)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.data.pipeline import batched
from transfusion_jax.data.sources import digits
from transfusion_jax.data.sources.dataset import Dataset, open_dataset
from transfusion_jax.data.sources.records import IMAGE
from transfusion_jax.data.sources.scenes import source as scenes
from transfusion_jax.data.sources.scenes.scene import SIDES
from transfusion_jax.errors import require
from transfusion_jax.files import local_path


@dataclass(frozen=True)
class ScenePictures:
    """The pictures of one split of the scenes, drawn when they are asked for."""

    split: str
    side: int

    def __len__(self) -> int:
        return scenes.COUNTS[self.split]

    def __getitem__(self, index: int) -> np.ndarray:
        return scenes.pictures(self.split, [index], self.side)[0]


@dataclass(frozen=True)
class PreparedPictures:
    """The first pictures of the documents of one split of prepared pixels."""

    dataset: Dataset
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        spans = self.dataset.record(int(self.numbers[index])).spans
        return self.dataset.image(next(x for kind, x in spans if kind == IMAGE))


def pictures(experiment: AutoencoderExperiment, split: str) -> Sequence[np.ndarray]:
    """Pictures of "train" or "held_out" by index, float32 [size, size, channels] in [-1, 1].

    Raises:
      ValueError: the source is unknown, or its pictures are not as the model says.
    """
    size, channels = experiment.model.size, experiment.model.channels
    if experiment.data == "scenes":
        require(
            size in SIDES and channels == 3,
            f"scenes are RGB pictures of {' or '.join(map(str, SIDES))} pixels, "
            f"not model.size={size}, model.channels={channels}",
        )
        return ScenePictures(split, size)
    if experiment.data == "digits":
        require(
            (size, channels) == (8, 1),
            f"digits need model.size=8, model.channels=1, not {size}, {channels}",
        )
        return digits.load(split)[0]
    if not (experiment.data and local_path(experiment.data).is_dir()):
        raise ValueError(
            f"data={experiment.data!r} is neither 'scenes', 'digits', nor a directory of prepared "
            "pictures"
        )
    dataset = open_dataset(Path(experiment.data))
    require(
        dataset.stored == "pixels",
        f"{experiment.data} holds {dataset.stored}; an autoencoder is trained on pixels",
    )
    require(
        dataset.image_shape == (size, size, channels),
        f"the pictures of {experiment.data} are {dataset.image_shape}, "
        f"not model.size={size}, model.channels={channels}",
    )
    numbers = dataset.numbers(split)
    numbers = numbers[dataset.index.images[numbers] > 0]
    require(len(numbers) > 0, f"{experiment.data} has no {split} pictures")
    return PreparedPictures(dataset, numbers)


def batches(experiment: AutoencoderExperiment, rows: Sequence[int]) -> grain.MapDataset:
    """Item s holds these pictures of global batch s; every epoch has an order of its own."""
    stream = (
        grain.MapDataset.source(pictures(experiment, "train"))
        .seed(experiment.train.seed)
        .shuffle()
        .repeat()
    )
    return batched(stream, experiment.train.batch, rows, np.stack)


def fingerprint(found: Sequence[np.ndarray]) -> str:
    """A digest of the number of pictures and of some of them, to notice that they changed."""
    digest = hashlib.sha256(str(len(found)).encode())
    for index in np.linspace(0, len(found) - 1, 16).astype(int):
        digest.update(np.ascontiguousarray(found[index]).tobytes())
    return digest.hexdigest()[:16]
