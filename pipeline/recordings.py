"""The recordings of a plan, opened: still what was planned and, in stage 2, what the codes were made from."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from codec.audio import AudioError, Header, Recording, probe
from pipeline.sources import stored
from shards.storage import Stored, at_hand

PLACES, PLACE_BYTES = 16, 4096  # of a file, by which its content is known again


def open_recording(row: dict[str, Any]) -> Recording:
    """The recording of a plan row. Raises AudioError when it is gone or, where the row has one, another content_crc32.

    Its header is compared with the plan where it is read; here, where the plan took a manifest at its word.
    """
    with _gone_is_a_reason():
        file = at_hand(stored(row["path"], row["offset"], row["file_bytes"]))
    if row.get("content_crc32") not in (None, content_crc32(file)):
        raise AudioError("the file is not the one that its codes were made from")
    header = Header(row["file_frames"], row["rate"], row["channels"])
    if row["channels"] is None:
        header = probe(file)
        if (header.frames, header.rate) != (row["file_frames"], row["rate"]):
            raise AudioError(
                f"the file holds {header.frames} frames at {header.rate} Hz, its manifest says {row['file_frames']} at "
                f"{row['rate']} Hz"
            )
    return Recording(file, header, row["first_frame"], row["frames"])


def content_crc32(file: Stored) -> int:
    """Of PLACES stretches spread over the file, and its size: it tells files apart without reading them whole.

    Raises AudioError when the file is gone.
    """
    with _gone_is_a_reason():
        size = file.stat().st_size
        crc = zlib.crc32(str(size).encode())
        with file.open("rb") as opened:
            for place in range(PLACES):
                opened.seek(place * max(size - PLACE_BYTES, 0) // (PLACES - 1))
                crc = zlib.crc32(opened.read(PLACE_BYTES), crc)
    return crc


@contextmanager
def _gone_is_a_reason() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AudioError(f"{error.strerror} since planning") from error
