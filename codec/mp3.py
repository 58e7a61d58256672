"""MP3 whose length is not stated, or is that of its first part alone: libsndfile guesses, and ends too early or never.

Its frames are counted, and one that says how many there are is put before them, as most files have it. So decoding,
which stays libsndfile's, ends where the file does. Facts: ISO/IEC 11172-3 and 13818-3, 2.4.2.3, for frames; Xing's
header as LAME writes it for their number; id3.org for tags.
"""

from __future__ import annotations

import io
import struct
from typing import IO, NamedTuple

from shards.stretch import Stretch, read_at

MPEG1, MPEG2, MPEG25 = 3, 2, 0  # the version's two bits
KBPS = {
    MPEG1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    MPEG2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
HZ = {MPEG1: (44_100, 48_000, 32_000), MPEG2: (22_050, 24_000, 16_000), MPEG25: (11_025, 12_000, 8_000)}
MONO = 3
TAGS_AT_THE_END = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")
LEADING_BYTES = 1 << 16  # before the first frame
SCRAP_BYTES = 1441 + 128  # behind the last frame: the longest one, not whole, and a tag
JOINED_FRAMES = 32  # that go on behind a stated end: a part ends there; programs differ by a frame in what they state


class Kind(NamedTuple):
    """What all frames of a recording share."""

    version: int
    hz: int
    is_mono: bool

    @property
    def samples(self) -> int:
        """Of one frame."""
        return 1152 if self.version == MPEG1 else 576

    @property
    def side_bytes(self) -> int:
        """Of side information, behind which a first frame tells of the others."""
        return ((17, 32) if self.version == MPEG1 else (9, 17))[not self.is_mono]


class Stated(NamedTuple):
    """What a first frame says: 0 for what it does not."""

    frames: int
    stop: int  # byte
    begin: int  # byte where audio does


def whole(file: IO[bytes], samples: int) -> IO[bytes]:
    """`file`, which libsndfile takes for so many samples; or, where it holds others, the same with a first frame that
    states them. A FLAC, in which libsndfile may lose its place behind a tag, without that tag.

    Raises ValueError where the frames end before the file, or others follow.
    """
    start, size = _behind_tags(file, 0), file.seek(0, io.SEEK_END)
    if read_at(file, start, 4) == b"fLaC":
        return _joined(b"", file, start, size) if start else file
    start, kind = _first(file, start, size)
    if kind is None:
        return file
    stated = _stated(file, start)
    if stated.frames and (not stated.stop or _count(file, stated.stop, size, JOINED_FRAMES)[0] < JOINED_FRAMES):
        return file
    n, stop = _count(file, stated.begin, size)
    if size - stop > SCRAP_BYTES and not read_at(file, stop, 16).startswith(TAGS_AT_THE_END):
        raise ValueError(f"its MP3 frames end or change at byte {stop} of {size}: it is damaged, or several in one")
    if n * kind.samples == samples and not stated.frames:
        return file
    return _joined(_stating(read_at(file, start, 4), n), file, stated.begin, stop)


def begun(file: IO[bytes]) -> IO[bytes] | None:
    """`file` from its first frame on, behind a scrap of another: libsndfile knows MP3 by its first bytes. None without
    frames.
    """
    start, kind = _first(file, _behind_tags(file, 0), size := file.seek(0, io.SEEK_END))
    return _joined(b"", file, start, size) if kind else None


def _first(file: IO[bytes], start: int, size: int) -> tuple[int, Kind | None]:
    """Where frames begin to follow each other, at byte `start` or behind a scrap of another frame, padding or a tag of
    unknown kind; and their kind (None: nowhere).
    """
    for begin in range(start, start + LEADING_BYTES, SCRAP_BYTES):  # of a remote file, no more than is needed
        piece, place = read_at(file, begin, SCRAP_BYTES + 3), -1
        while 0 <= (place := piece.find(0xFF, place + 1)) < SCRAP_BYTES:
            kind, _ = _frame(piece[place : place + 4])
            if kind:
                n, stop = _count(file, begin + place, size, JOINED_FRAMES)
                if n == JOINED_FRAMES or (n and size - stop <= SCRAP_BYTES):
                    return begin + place, kind
    return start, None


def _stated(file: IO[bytes], start: int) -> Stated:
    """By the frame at byte `start`."""
    kind, length = _frame(read_at(file, start, 4))
    told = read_at(file, start, length)[4 + (kind.side_bytes if kind else 0) :]
    if told[:4] not in (b"Xing", b"Info") or len(told) < 16:
        return Stated(0, 0, start)
    flags, frames, n_bytes = struct.unpack_from(">III", told, 4)
    stop = start + n_bytes if flags & 3 == 3 and n_bytes else 0
    return Stated(frames if flags & 1 else 0, stop, start + length)


def _count(file: IO[bytes], at: int, size: int, most: int | None = None) -> tuple[int, int]:
    """How many whole frames of one kind follow each other from byte `at`, tags between them or not, `most` at most;
    and where they end.
    """
    n, kind = 0, None
    while n != most:
        here = at if (found := _frame(read_at(file, at, 4)))[0] else _behind_tags(file, at)
        now, length = found if here == at else _frame(read_at(file, here, 4))
        if now is None or now != (kind or now) or here + length > size:
            break
        n, at, kind = n + 1, here + length, now
    return n, at


def _frame(head: bytes) -> tuple[Kind | None, int]:
    """The kind of the layer III frame that begins with these four bytes, and its length in bytes."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None, 0
    version, bits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version not in HZ or not 0 < bits < 15 or rate == 3:
        return None, 0
    kind = Kind(version, HZ[version][rate], head[3] >> 6 == MONO)
    kbps = KBPS[MPEG1 if version == MPEG1 else MPEG2][bits - 1]
    return kind, kind.samples * 125 * kbps // kind.hz + (head[2] >> 1 & 1)


def _stating(head: bytes, frames: int) -> bytes:
    """A frame like the one that `head` begins, which says how many follow."""
    head = bytes([0xFF, head[1] | 1, 0x90 | head[2] & 0x0C, head[3]])  # long enough at any rate, without a checksum
    kind, length = _frame(head)
    assert kind is not None
    return (head + bytes(kind.side_bytes) + b"Info" + struct.pack(">II", 1, frames)).ljust(length, b"\0")


def _behind_tags(file: IO[bytes], at: int) -> int:
    """Where the ID3v2 tags end that begin at byte `at`."""
    while (head := read_at(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        at += 10 + size + (10 if head[5] & 0x10 else 0)
    return at


def _joined(before: bytes, file: IO[bytes], start: int, stop: int) -> IO[bytes]:
    """`before`, then bytes [start, stop) of `file`."""

    def read(a: int, b: int) -> bytes:
        return before[a:b] if a < len(before) else read_at(file, start + a - len(before), b - a)

    return io.BufferedReader(Stretch(read, 0, len(before) + stop - start))
