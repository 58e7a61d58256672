"""A stretch of something longer: read, or as a file of its own."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import IO, Any


def read_at(file: IO[bytes], place: int, n: int) -> bytes:
    file.seek(place)
    return file.read(n)


class Stretch(io.RawIOBase):
    """Bytes [offset, offset + size) of what `read(start, stop)` reads."""

    def __init__(
        self, read: Callable[[int, int], bytes], offset: int, size: int, close: Callable[[], None] = lambda: None
    ) -> None:
        self._read, self._offset, self._size, self._close = read, offset, size, close
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._place)
        if size <= 0:
            return 0
        start = self._offset + self._place
        data = self._read(start, start + size)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._close()
        super().close()
