"""Found recordings → their lengths: by a manifest's word, else from the files' headers, read in parallel, once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from codec.audio import AudioError, probe
from configs.progress import progress_bar
from pipeline.sources import stored
from shards.files import reason_of_one
from shards.pieces import skimmed
from shards.storage import READERS, locate

# A manifest's end may lie this far after the file's: people round, voices are found in frames of up to 62 ms, and who
# counts an MP3's frames counts what LAME fills them up with: 102 ms at 16 kHz, 41 at 44.1.
END_TOLERANCE_SECONDS = 0.11
MOST_AT_ONCE = 100  # files whose headers a thread reads at once
Place = tuple[str, int | None, int | None]  # path, offset and bytes
HEADER = ("file_frames", "rate", "channels", "file_bytes", "problem")


def measure(found: pa.Table) -> pa.Table:
    """FOUND_SCHEMA → with `file_frames`, `rate`, `channels`, and `first_frame` and `frames` of what is to be read.

    What cannot be used has a `problem` and zeros.
    """
    unknown = pc.and_(pc.is_null(found["frames"]), pc.is_null(found["problem"])).to_numpy(zero_copy_only=False)
    table = found.drop_columns("frames").append_column("file_frames", found["frames"])
    table = table.append_column("channels", pa.nulls(len(table), pa.int32()))
    if unknown.any():
        table = _with_headers(table, np.flatnonzero(unknown))
    return _stretches(table)


def _with_headers(table: pa.Table, rows: npt.NDArray[np.intp]) -> pa.Table:
    wanted = table.take(pa.array(rows))
    places = list(zip(*(wanted[name].to_pylist() for name in ("path", "offset", "file_bytes")), strict=True))
    files = list(dict.fromkeys(places))
    headers = dict(zip(files, _headers(files), strict=True))
    for name, values in zip(HEADER, zip(*map(headers.__getitem__, places), strict=True), strict=True):
        field = table.schema.field(name)
        column = table[name].to_pylist()
        for row, value in zip(rows.tolist(), values, strict=True):
            column[row] = value
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type))
    return table


def _headers(files: list[Place]) -> Iterator[tuple[Any, ...]]:
    """HEADER of each, in order. Of many files a thread takes several at once: to hand out a million one by one takes
    minutes and gigabytes, and Ctrl-C meanwhile may leave the threads waiting for each other.
    """
    several = min(max(len(files) // READERS**2, 1), MOST_AT_ONCE)
    parts = [files[start : start + several] for start in range(0, len(files), several)]
    bar = progress_bar(total=len(files), desc="reading headers", unit="file")
    with bar, ThreadPoolExecutor(READERS) as pool, ExitStack() as left_early:
        left_early.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C waits for the files in hand alone
        for found in pool.map(lambda part: [*map(_header, part)], parts):
            bar.update(len(found))
            yield from found


def _header(place: Place) -> tuple[Any, ...]:
    """HEADER of one file."""
    try:
        file = skimmed(stored(*place), place[-1])
        header = probe(file)
        return header.frames, header.rate, header.channels, file.stat().st_size, None
    except AudioError as error:
        return None, None, None, None, str(error)
    except OSError as error:
        return None, None, None, None, reason_of_one(locate(place[0]), error)


def _stretches(table: pa.Table) -> pa.Table:
    """Which frames of its file each recording is; an end outside of it is a problem."""
    file_frames, rate = (_numbers(table[name]) for name in ("file_frames", "rate"))
    usable = pc.is_null(table["problem"]).to_numpy(zero_copy_only=False)
    seconds = file_frames / np.maximum(rate, 1)
    start, end = (
        np.nan_to_num(_numbers(table["start"], 0.0)),
        np.nan_to_num(_numbers(table["end"], np.inf), posinf=np.inf),
    )
    first = np.rint(np.minimum(start, seconds) * rate).astype(np.int64)
    frames = np.rint(np.minimum(end, seconds) * rate).astype(np.int64) - first
    too_far = np.isfinite(end) & (end > seconds + END_TOLERANCE_SECONDS) | (_numbers(table["end"], 0.0) == np.inf)
    outside = usable & ((frames <= 0) | too_far)
    problem = table["problem"].to_pylist()
    for row in np.flatnonzero(outside).tolist():
        asked = f"{start[row]:g} … {table['end'][row].as_py()} s"
        problem[row] = f"{asked} is not inside its {seconds[row]:g} s, or holds no sample"
    unusable = ~usable | outside
    new = {
        "file_frames": np.where(unusable, 0, file_frames),
        "rate": np.where(unusable, 0, rate).astype(np.int32),
        "first_frame": np.where(unusable, 0, first),
        "frames": np.where(unusable, 0, frames),
    }
    for name, values in {**new, "problem": pa.array(problem, pa.string())}.items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, pa.array(values)) if at < 0 else table.set_column(at, name, pa.array(values))
    return table


def _numbers(column: pa.ChunkedArray, null: float = 0) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = pc.fill_null(column, null).to_numpy()
    return values
