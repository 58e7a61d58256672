"""Whether a file holds what its header says, neither less nor more: libsndfile quietly reads what is there of both."""

from __future__ import annotations

import re
import struct

import soundfile

from shards.pieces import Stored
from shards.stretch import read_at

MAX_OGG_PAGE = 27 + 255 + 255 * 255  # bytes
# What programs write that stream to a pipe. SoX writes the second (src/wav.c), in whole frames.
UNKNOWN_WAV_LENGTHS = {0x7FFFFFFF, *range(0x7FFFF000 - 64, 0x7FFFF001), 0xFFFFFFFF}
SCRAP_BYTES = 4096  # behind a WAV's samples: some programs leave a few
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's word for them


def why_not(file: soundfile.SoundFile, path: Stored) -> str | None:
    """The reason why an open file is not read as it is."""
    if file.format in ("WAV", "WAVEX"):
        return _of_wav(file, path)
    if file.format == "OGG":
        return _of_ogg(path)
    if file.frames == UNKNOWN_FRAMES:
        return "its header states no length, as where a program wrote to a pipe: convert it anew, to a file"
    return None


def _of_wav(file: soundfile.SoundFile, path: Stored) -> str | None:
    promised = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if promised and int(promised[1]) not in UNKNOWN_WAV_LENGTHS and int(promised[1]) > int(promised[2]):
        return f"cut off: the header promises {promised[1]} bytes of samples, the file holds {promised[2]}"
    more, told = _behind_samples(path)
    if more > SCRAP_BYTES:
        return (
            f"the header tells of {told} bytes of samples, {more} more follow, as in a WAV of more than 4 GiB or of a "
            "program that was killed: convert it with `ffmpeg -ignore_length 1`"
        )
    return None


def _behind_samples(path: Stored) -> tuple[int, int]:
    """How many bytes follow a WAV's samples, unless they are chunks; how many bytes the samples are."""
    size, at = path.stat().st_size, 12
    with path.open("rb") as file:
        while len(head := read_at(file, at, 8)) == 8:
            name, length = struct.unpack("<4sI", head)
            at += 8 + length + length % 2
            if name == b"data":
                break
        else:
            return 0, 0
        name, behind = struct.unpack("<4sI", read_at(file, at, 8).ljust(8, b"\0"))
    is_chunk = name.isascii() and name.decode().isprintable() and at + 8 + behind <= size
    return 0 if is_chunk else size - at, length


def _of_ogg(path: Stored) -> str | None:
    """It ends at its last whole page, and where another stream begins; the last page shows both."""
    with path.open("rb") as file:
        first = read_at(file, 14, 4)
        page = read_at(file, max(path.stat().st_size - MAX_OGG_PAGE, 0), MAX_OGG_PAGE).rpartition(b"OggS\0")[2]
    # what follows: flags, position (8), serial (4), number (4), checksum (4), sizes, their payload
    if len(page) < 22 or len(page) < 22 + page[21] + sum(page[22 : 22 + page[21]]):
        return "cut off: its last Ogg page is incomplete"
    if page[9:13] != first:
        return "holds several Ogg streams, of which only the first would be read: convert it to FLAC"
    return None
