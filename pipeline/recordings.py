"""The recordings of a plan, opened: still what was planned and, in stage 2, what the codes were made from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from codec.audio import SEEKABLE_EXTENSIONS, AudioError, File, Header, Recording, probe
from pipeline.sources import stored
from shards.contract import COARSE_24K, CODEC_RATE, Row
from shards.errors import UserError
from shards.files import reason_of_one
from shards.pieces import Stored, at_hand, version
from shards.storage import locate
from shards.stretch import read_at


def by_file(row: Row) -> tuple[Any, ...]:
    """What neighbouring rows share that one thread reads: a file that is fetched, or decoded from its beginning.

    Of one in which it can seek, every recording is for itself, so that several threads read it.
    """
    path = row["path"]
    is_quick = isinstance(locate(path), Path) and Path(path).suffix.lower() in SEEKABLE_EXTENSIONS
    return path, row["offset"], row["recording"] if is_quick else None


class Opener:
    """Opens recordings, those of one file after each other: it is fetched, looked at and decoded once for all."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._file: File | None = None

    @cached_property
    def _place(self) -> Stored:
        with _gone_is_a_reason(self._row):
            size = self._row["file_bytes"]
            return at_hand(stored(self._row["path"], self._row["offset"], size), size)

    @cached_property
    def _version(self) -> tuple[int, int | str]:
        with _gone_is_a_reason(self._row):
            return version(self._place)

    @cached_property
    def _found(self) -> Header:
        return probe(self._place)

    def recording(self, row: Row) -> Recording:
        """The recording of a plan row. Raises AudioError when it is gone.

        Its header is compared with the plan where it is read; here, where the plan took a manifest at its word.
        """
        place, header = self._place, Header(row["file_frames"], row["rate"], row["channels"])
        if row["channels"] is None:
            header = self._found
            if (header.frames, header.rate) != (row["file_frames"], row["rate"]):
                raise AudioError(
                    f"the file holds {header.frames} frames at {header.rate} Hz, its manifest says "
                    f"{row['file_frames']} at {row['rate']} Hz"
                )
        self.check()
        if self._file is None or self._file.header != header:
            self._file = File(place, header)
        return Recording(place, header, row["first_frame"], row["frames"], self._file)

    def check(self) -> None:
        """Raises AudioError where what was read since it was opened, content and samples, may be of two files."""
        before = self._version
        with _gone_is_a_reason(self._row):
            if version(self._place) != before:
                raise AudioError("the file changed while it was read")


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
            return zlib.crc32(read_at(opened, start, stop - start))


@contextmanager
def _gone_is_a_reason(row: Row) -> Iterator[None]:
    """Where it is this file that is gone, and not the folder of all recordings."""
    try:
        yield
    except OSError as error:
        # ids are paths below the folder of all recordings, where no manifest names them
        folder = locate(row["path"].removesuffix(row["recording"]))
        if row["path"].endswith("/" + row["recording"]) and not folder.exists():
            raise UserError(f"{folder} is not there: is it mounted? Then the same command goes on") from error
        raise AudioError(f"{reason_of_one(locate(row['path']), error)} since planning") from error
