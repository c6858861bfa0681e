"""Reader of text files, a document each; a long one becomes several."""

import hashlib
from collections.abc import Sequence

import numpy as np

from transfusion_jax.preparation.readers.collection import Scanned
from transfusion_jax.preparation.readers.folder import Folder
from transfusion_jax.preparation.readers.lines import line_starts
from transfusion_jax.preparation.readers.names import Names
from transfusion_jax.preparation.readers.raw import Columns, Raw, Rejected, text_of

TEXT_PIECE = 1 << 20  # bytes of a text file in one document


class TextFiles:
    """Files of more than a MiB are cut after the ends of lines, about a MiB to a document."""

    def __init__(self, folder: Folder, columns: Columns, arrays: dict[str, np.ndarray]) -> None:
        self._folder = folder
        self._names = Names(arrays["names"], arrays["name_starts"])
        self._file = arrays["file"]
        self._begin = arrays["begin"]
        self._end = arrays["end"]

    @staticmethod
    def scan(folder: Folder, files: Sequence[str], sizes: Sequence[int]) -> Scanned:
        """The index of files of these sizes: where the pieces of each begin and end.

        A file that cannot be read is one piece, so that it is counted.
        """
        names = Names.of(files)
        owner, begin, end = [], [], []
        digest = hashlib.sha256(names.content)
        for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
            cuts, content = _cuts(folder, file, size)
            digest.update(f"{cuts} {content}".encode())
            owner += [number] * (len(cuts) - 1)
            begin += cuts[:-1]
            end += cuts[1:]
        arrays = {
            "names": names.content,
            "name_starts": names.starts,
            "file": np.asarray(owner, np.int64),
            "begin": np.asarray(begin, np.int64),
            "end": np.asarray(end, np.int64),
        }
        return Scanned(arrays, len(owner), digest.hexdigest())

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Raw:
        file = self._names[int(self._file[index])]
        begin, end = int(self._begin[index]), int(self._end[index])
        name = f"{file} at byte {begin}" if begin else file
        return Raw(name, (text_of(self._folder.read_part(file, begin, end, name), name),))


def _cuts(folder: Folder, file: str, size: int) -> tuple[list[int], str]:
    """Where a file is cut, its begin and end included; and a digest of its content."""
    try:
        if size <= TEXT_PIECE:
            content = folder.read_part(file, 0, size, file)
            return [0, size], hashlib.sha256(content).hexdigest()
        starts, digest = line_starts(folder, file)
    except Rejected:
        return [0, size], ""
    wanted = np.arange(0, starts[-1], TEXT_PIECE)
    return np.unique([*starts[np.searchsorted(starts, wanted)], starts[-1]]).tolist(), digest
