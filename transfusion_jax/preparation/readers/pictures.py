"""Reader of a folder of pictures, the caption of `a.jpg` in `a.txt`."""

import functools
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from transfusion_jax.preparation.readers.collection import Scanned
from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.names import Names
from transfusion_jax.preparation.readers.raw import (
    PICTURES,
    Columns,
    Picture,
    Raw,
    Rejected,
    text_of,
)


class SideBySide:
    """An item for every picture, also for those that have no caption or cannot be read."""

    def __init__(self, folder: Folder, columns: Columns, arrays: dict[str, np.ndarray]) -> None:
        self._folder = folder
        self._names = Names(arrays["names"], arrays["name_starts"])
        self._captioned = arrays["captioned"]

    @staticmethod
    def scan(folder: Folder, pictures: Sequence[str], captioned: Sequence[bool]) -> Scanned:
        """The index of pictures, and whether each has a caption beside it.

        The digest is that of names and captions.
        """
        names = Names.of(pictures)
        digest = hashlib.sha256(names.content)
        for name, has_caption in zip(pictures, captioned, strict=True):
            digest.update(_caption_digest(folder, caption_file(name)) if has_caption else b"none")
        arrays = {
            "names": names.content,
            "name_starts": names.starts,
            "captioned": np.asarray(captioned, bool),
        }
        return Scanned(arrays, len(pictures), digest.hexdigest())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Raw:
        name = self._names[index]
        if not name.lower().endswith(PICTURES):
            raise Rejected("unsupported picture format", name)
        if not self._captioned[index]:
            raise Rejected("no caption", name)
        caption = text_of(self._folder.read(caption_file(name), name), name)
        load = functools.partial(self._folder.read, name, name)
        return Raw(name, (Picture(load, name),), (caption,))


def _caption_digest(folder: Folder, file: str) -> bytes:
    try:
        return hashlib.sha256(folder.read(file, file)).digest()
    except Rejected:
        return b"unreadable"


def caption_file(picture: str) -> str:
    """The name of the file with the caption of a picture."""
    return os.path.splitext(picture)[0] + ".txt"
