"""Reader of WebDataset tar files."""

import functools
import hashlib
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from transfusion_jax.preparation.readers.collection import Scanned
from transfusion_jax.preparation.readers.documents import (
    captions_of,
    holds_another_picture,
    json_of,
)
from transfusion_jax.preparation.readers.folder import Folder, read_at
from transfusion_jax.preparation.readers.raw import (
    PICTURES,
    Columns,
    Picture,
    Raw,
    Rejected,
    is_picture,
    text_of,
)

CAPTIONS = (".txt", ".json")  # endings, the first that a sample has is taken


class WebDataset:
    """A tar file of samples: a picture with a `.txt` or `.json` of the same stem.

    The index holds where the headers of each sample's members are, and no more: names and sizes are
    read from the headers again. Damaged members are items too, so that they are counted.
    """

    def __init__(
        self, folder: Folder, file: str, columns: Columns, arrays: dict[str, np.ndarray]
    ) -> None:
        self._folder = folder
        self._file = file
        self._ignored = frozenset(columns.ignored)
        self._headers = arrays["headers"]
        self._starts = arrays["starts"]
        self._damaged = arrays["damaged"]

    @staticmethod
    def scan(folder: Folder, file: str, columns: Columns) -> Scanned:
        """The index holds where the headers of each sample's members are.

        Raises:
          ValueError: it holds no file.
          Rejected: it cannot be read.
        """
        samples: list[list[int]] = []
        damaged: list[int] = []
        latest: dict[str, tuple[set[str], list[int]]] = {}
        digest = hashlib.sha256()
        with folder.open(file, file) as opened:
            digest.update(str(os.fstat(opened.fileno()).st_size).encode())
            for member in _members(opened, damaged):
                digest.update(repr((member.name, member.offset_data, member.size)).encode())
                stem, ending = _parts(member.name)
                if ending in latest.get(stem, ({ending}, []))[0]:  # new, or a name used again
                    latest[stem] = (set(), [])
                    samples.append(latest[stem][1])
                latest[stem][0].add(ending)
                latest[stem][1].append(member.offset)
                if ending in CAPTIONS:
                    digest.update(_caption_digest(opened, member, folder.max_bytes))
        digest.update(repr(damaged).encode())
        if not samples:
            raise ValueError(
                f"{folder.root / file} is no tar file that can be read (a compressed one has to be "
                "unpacked)"
            )
        arrays = {
            "headers": np.asarray([offset for sample in samples for offset in sample], np.int64),
            "starts": np.cumsum([0, *map(len, samples)], dtype=np.int64),
            "damaged": np.asarray(damaged, np.int64),
        }
        return Scanned(arrays, len(samples) + len(damaged), digest.hexdigest())

    def __len__(self) -> int:
        return len(self._starts) - 1 + len(self._damaged)

    def __getitem__(self, index: int) -> Raw:
        samples = len(self._starts) - 1
        if index >= samples:
            where = int(self._damaged[index - samples])
            raise Rejected("bad tar member", f"{self._file} at byte {where}")
        offsets = self._headers[self._starts[index] : self._starts[index + 1]].tolist()
        with self._folder.open(self._file, self._file) as file:
            members, name = self._sample(file, offsets)
            members = {ending: m for ending, m in members.items() if not self._ignores(ending)}
            pictures = [ending for ending in members if is_picture(ending)]
            if not pictures:
                raise Rejected("no image", name)
            if len(pictures) > 1:
                raise Rejected("several images", name)
            if not pictures[0].endswith(PICTURES):
                raise Rejected("unsupported picture format", name)
            ending = next((ending for ending in CAPTIONS if ending in members), None)
            if ending is None:
                raise Rejected("no caption", name)
            caption = self._content(file, members[ending], name)
        if ending == ".txt":
            captions = (text_of(caption, name),)
        else:
            captions = self._captions(caption, name)
        load = functools.partial(self._picture, members[pictures[0]], name)
        return Raw(name, (Picture(load),), captions)

    def _ignores(self, ending: str) -> bool:
        """Of `.thumb.jpg`, whether `thumb` is ignored, or `thumb.jpg`."""
        return not self._ignored.isdisjoint({ending[1:], ending.split(".")[1]})

    def _captions(self, content: bytes, name: str) -> tuple[str, ...]:
        """Those in a sample's JSON; raises Rejected if it has none, or holds another picture."""
        value = json_of(content, name)
        if isinstance(value, dict):
            value = {key: v for key, v in value.items() if key not in self._ignored}
            if holds_another_picture(value, os.path.basename(name)):
                raise Rejected("unknown key with a picture", name, content)
        return captions_of(value, name)

    def _sample(self, file: BinaryIO, offsets: list[int]) -> tuple[dict[str, tarfile.TarInfo], str]:
        """The members of a sample by their endings, and its name."""
        members = {}
        stem = ""
        for offset in offsets:
            file.seek(offset)
            try:
                member = tarfile.open(fileobj=file, mode="r:").next()
            except Exception as error:  # what is no header fails in many ways
                raise Rejected("bad tar member", f"{self._file} at byte {offset}") from error
            stem, ending = _parts(member.name)
            members[ending] = member
        return members, f"{self._file}/{stem}"

    def _picture(self, member: tarfile.TarInfo, name: str) -> bytes:
        with self._folder.open(self._file, self._file) as file:
            return self._content(file, member, name)

    def _content(self, file: BinaryIO, member: tarfile.TarInfo, name: str) -> bytes:
        if not member.isfile() or member.sparse is not None:
            raise Rejected("not a regular file", name)
        if member.size < 0:
            raise Rejected("bad tar member", name)
        return read_at(file, member.offset_data, member.size, self._folder.max_bytes, name)


def _caption_digest(file: BinaryIO, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    try:
        content = read_at(file, member.offset_data, max(member.size, 0), max_bytes, member.name)
    except Rejected:
        return b"unreadable"
    return hashlib.sha256(content).digest()


def _parts(name: str) -> tuple[str, str]:
    """The stem of a member, with its folder, and its ending: "a/b.seg.PNG" is "a/b", ".seg.png"."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f".{ending.lower()}"


def _members(file: BinaryIO, damaged: list[int]) -> Iterator[tarfile.TarInfo]:
    """Everything in a tar but folders; after a damaged header, from the next that is none.

    Appends to `damaged` where members are that cannot be read.
    """
    at = 0
    for member, begin, end in _headers(file, os.fstat(file.fileno()).st_size):
        if begin > at:
            file.seek(at)
            header = file.read(tarfile.BLOCKSIZE)
            # Zeros are an end mark, and "g" is a header for all members.
            if header.strip(b"\0") and header[156:157] != tarfile.XGLTYPE:
                damaged.append(at)
        if member is not None and not member.isdir():
            yield member
        at = end


def _headers(file: BinaryIO, size: int) -> Iterator[tuple[tarfile.TarInfo | None, int, int]]:
    """Members of a tar, each with its begin and end; what is no header is skipped.

    The last is None, at the end of the file.
    """
    at = 0
    while at < size:
        file.seek(at)
        tar = None
        try:
            tar = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
            while (member := tar.next()) is not None:
                tar.members.clear()  # which only grow
                if tar.offset <= max(at, member.offset):  # a negative size leads back, for ever
                    raise tarfile.InvalidHeaderError("negative size")
                at = tar.offset
                yield member, member.offset, at
            break
        except OSError:
            raise
        except Exception:  # what is no header fails in many ways
            at = max(tar.offset if tar else 0, at) + tarfile.BLOCKSIZE
    yield None, size, size
