"""Bytes as files, wherever they are: a member of a tar, what was fetched, and what is fetched where it is read."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards import storage
from shards.storage import Location, Stat, Url
from shards.stretch import Stretch, read_at

HEADER_BYTES = 1 << 14  # fetched at first where headers alone are wanted
END_BYTES = 1 << 16  # fetched at once of their end: an Ogg page


@dataclass(frozen=True)
class Part:
    """Bytes [offset, offset + size) of a file, read as a file of its own: a member of a tar."""

    whole: Location
    offset: int
    size: int

    def stat(self) -> Stat:
        """Less than `size` where the file ends early."""
        return Stat(max(min(self.size, self.whole.stat().st_size - self.offset), 0))

    def open(self, mode: str = "rb") -> IO[bytes]:
        assert mode == "rb"
        if isinstance(self.whole, Url):
            return self.whole.open_stretch(self.offset, self.size)
        file = self.whole.open("rb")
        stretch = Stretch(lambda a, b: read_at(file, a, b - a), self.offset, self.size, file.close)
        return io.BufferedReader(stretch)


@dataclass(frozen=True, eq=False)
class Fetched:
    """Bytes that were read once, however often they are opened."""

    data: bytes
    name: str = ""

    def __str__(self) -> str:
        return self.name

    def stat(self) -> Stat:
        return Stat(len(self.data))

    def open(self, mode: str = "rb") -> IO[bytes]:
        assert mode == "rb"
        return io.BytesIO(self.data)


class Skimmed:
    """Bytes [offset, offset + size) of a remote object, fetched where they are read; more at once where it goes on."""

    def __init__(self, whole: Url, offset: int, size: int) -> None:
        self._whole, self._offset, self._size = whole, offset, size
        self._held = deque[tuple[int, bytes]](maxlen=4)  # what was fetched last, and where it begins
        self._end, self._length = 0, HEADER_BYTES // 2  # of the last of it

    def stat(self) -> Stat:
        return Stat(self._size)

    def open(self, mode: str = "rb") -> IO[bytes]:
        assert mode == "rb"
        return io.BufferedReader(Stretch(self._read, 0, self._size))

    def _read(self, start: int, stop: int) -> bytes:
        """Of [start, stop) as much as one answer holds, which is at least a byte."""
        for begin, data in self._held:
            if begin <= start < begin + len(data):
                return data[start - begin : stop - begin]
        self._length = min(2 * self._length, storage.BLOCK_BYTES) if start == self._end else HEADER_BYTES
        end = max(stop, start + self._length)
        self._end = self._size if self._size - end < (END_BYTES if start else HEADER_BYTES) else end
        data = self._whole.read_bytes(self._offset + start, self._offset + self._end)
        self._held.append((start, data))
        return data[: stop - start]


Stored = Path | Url | Part | Fetched | Skimmed  # where the bytes of one recording are


def version(place: Stored) -> tuple[int, int | str]:
    """Another one for other bytes: size, and time in ns or the storage's tag; of a member those of its tar."""
    stat = (place.whole if isinstance(place, Part) else place).stat()
    return stat.st_size, stat.tag if isinstance(stat, Stat) else stat.st_mtime_ns


def at_hand(place: Path | Url | Part, size: int | None) -> Stored:
    """What is remote, fetched once; one above storage.WHOLE_BYTES is left where it is. It is asked for its size unless
    that is known; where it is another by now, all of it is fetched.
    """
    if isinstance(place, Path) or (isinstance(place, Part) and isinstance(place.whole, Path)):
        return place
    if (place.stat().st_size if size is None else size) > storage.WHOLE_BYTES:
        return place
    if isinstance(place, Url):
        return Fetched(place.read_bytes())
    with place.open() as file:
        return Fetched(file.read())


@contextmanager
def nearby(place: Location) -> Iterator[Path]:
    """A file on this machine with its bytes, as long as they are needed: what is remote is fetched, whole."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix=storage.OURS) as folder:
        local = Path(folder) / place.name
        place.fetch(local)
        yield local


def skimmed(place: Path | Url | Part, size: int | None = None) -> Stored:
    """What is remote, for a look at its headers; it is asked for its size unless that is known."""
    whole, offset = (place.whole, place.offset) if isinstance(place, Part) else (place, 0)
    if not isinstance(whole, Url):
        return place
    return Skimmed(whole, offset, place.stat().st_size if size is None else size)
