"""The recordings of a plan, opened: still what was planned and, in stage 2, what the codes were made from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codec.audio import AudioError, Header, Recording, probe
from pipeline.sources import stored
from shards.contract import COARSE_24K, CODEC_RATE
from shards.errors import UserError
from shards.files import reason_of_one
from shards.storage import Stored, at_hand, locate

Row = dict[str, Any]


def open_recording(row: Row) -> Recording:
    """The recording of a plan row. Raises AudioError when it is gone.

    Its header is compared with the plan where it is read; here, where the plan took a manifest at its word.
    """
    with _gone_is_a_reason(row):
        file = at_hand(stored(row["path"], row["offset"], row["file_bytes"]))
    header = Header(row["file_frames"], row["rate"], row["channels"])
    if row["channels"] is None:
        header = probe(file)
        if (header.frames, header.rate) != (row["file_frames"], row["rate"]):
            raise AudioError(
                f"the file holds {header.frames} frames at {header.rate} Hz, its manifest says {row['file_frames']} at "
                f"{row['rate']} Hz"
            )
    return Recording(file, header, row["first_frame"], row["frames"])


def check_content(recording: Recording, rows: Iterable[Row]) -> None:
    """Raises AudioError where rows know the content that their codes were made from, and it is another."""
    for row in rows:
        known = row.get("content_crc32")
        if known is not None and content_crc32(recording.path, row) != known:
            raise AudioError("the file is not the one that its codes were made from")


def content_crc32(file: Stored, row: Row) -> int:
    """Of the share of the file's bytes that the segment `row` is of its frames: together they are the whole file.

    Raises AudioError when the file is gone.
    """
    coarse = row["start_coarse"], row["start_coarse"] + row["n_coarse"]
    frames = (row["first_frame"] + place * COARSE_24K * row["rate"] // CODEC_RATE for place in coarse)
    with _gone_is_a_reason(row):
        size = file.stat().st_size
        start, stop = (min(size * frame // row["file_frames"], size) for frame in frames)
        if start == stop:  # a named pipe would wait for a writer
            return 0
        with file.open("rb") as opened:
            opened.seek(start)
            return zlib.crc32(opened.read(stop - start))


@contextmanager
def _gone_is_a_reason(row: Row) -> Iterator[None]:
    """Where it is this file that is gone, and not the folder of all recordings."""
    try:
        yield
    except OSError as error:
        folder = Path(
            row["path"].removesuffix(row["recording"])
        )  # ids are paths below it, where no manifest names them
        if row["path"].endswith("/" + row["recording"]) and not folder.exists():
            raise UserError(f"{folder} is not there: is it mounted? Then the same command goes on") from error
        raise AudioError(f"{reason_of_one(locate(row['path']), error)} since planning") from error
