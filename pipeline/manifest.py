"""A manifest: one row per recording, in Parquet, CSV or JSONL."""

from __future__ import annotations

import json
import math
import posixpath
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from codec.audio import MAX_RATE, MIN_RATE
from shards.contract import SPLITS
from shards.errors import UserError
from shards.storage import Location

MANIFESTS = (".parquet", ".csv", ".jsonl", ".ndjson")
COLUMNS = {
    "path": pa.string(),
    "id": pa.string(),
    "speaker": pa.string(),
    "split": pa.string(),
    "start": pa.float64(),  # seconds
    "end": pa.float64(),
    "frames": pa.int64(),  # of the whole file, at its own rate: with `rate`, planning opens no file
    "rate": pa.int64(),  # Hz
}
EXPECTED = {pa.string(): "text", pa.float64(): "seconds, such as 5.25", pa.int64(): "a whole number"}
MAX_FRAMES = 1 << 40


def read_manifest(path: Location) -> tuple[dict[str, list[Any]], Counter[str]]:
    """Columns as `pipeline.sources` names them, and what was ignored. Raises UserError naming row and value."""
    table = _read(path)
    ignored = Counter(f"column {name}" for name in table.column_names if name not in COLUMNS)
    for name in table.column_names:
        if name not in COLUMNS and (meant := name.strip().lower()) in COLUMNS.keys() - {*table.column_names}:
            raise UserError(f"{path}: its column {name!r} would be ignored: call it {meant!r}, or something else")
    if "path" not in table.column_names:
        raise UserError(f"{path} has no column named path; its columns are {table.column_names}")
    for name, other in (("frames", "rate"), ("rate", "frames")):
        if name in table.column_names and other not in table.column_names:
            ignored[f"column {name}, which says nothing without {other}"] += 1
    _check(path, table)
    given = {name: table[name].to_pylist() for name in COLUMNS if name in table.column_names}
    names, nothing = given["path"], [None] * len(table)
    start = [value or 0.0 for value in given.get("start", nothing)]
    end = given.get("end", nothing)
    folder = str(path.parent)
    frames, rate, problem = _stated(given.get("frames", nothing), given.get("rate", nothing))
    for row, (a, b) in enumerate(zip(start, end, strict=True)):
        if not (0 <= a < (math.inf if b is None else b)):
            problem[row] = f"start {a:g} s and end {b} s are not a stretch of time"
        if "\0" in names[row]:
            problem[row] = "its path holds a null character"
    columns: dict[str, list[Any]] = {
        "recording": [id or _id(*rest) for id, *rest in zip(given.get("id", nothing), names, start, end, strict=True)],
        "name": names,
        "path": [_joined(folder, name) for name in names],
        "group": given.get("speaker", nothing),
        "split": [split or None for split in given.get("split", nothing)],
        **{"start": start, "end": end, "frames": frames, "rate": rate, "problem": problem},
    }
    return columns, ignored


def _joined(folder: str, name: str) -> str:
    path = name if "://" in name else posixpath.join(folder, name)
    if "://" in path:
        return path
    if "/../" in path and "\0" not in path:
        path = posixpath.join(_without_dots(posixpath.dirname(path)), posixpath.basename(path))
    return posixpath.normpath(path)


@lru_cache(maxsize=1 << 16)
def _without_dots(folder: str) -> str:
    """As it is written but for "..", unless that leads elsewhere: behind a link it is the parent of the link's end."""
    normal, real = posixpath.normpath(folder), posixpath.realpath(folder)
    return normal if posixpath.realpath(normal) == real else real


def _check(path: Location, table: pa.Table) -> None:
    empty = pc.index(pc.fill_null(pc.equal(pc.binary_length(table["path"]), 0), True), True).as_py()
    if empty >= 0:
        raise UserError(f"{path}, row {empty + 1}: path is empty")
    if "split" not in table.column_names:
        return
    known = pc.is_in(table["split"], pa.array([None, "", *SPLITS], pa.string()))
    wrong = pc.index(known, False).as_py()
    if wrong >= 0:
        raise UserError(
            f"{path}, row {wrong + 1}: split is {table['split'][wrong].as_py()!r}, expected one of "
            f"{', '.join(SPLITS)}, or nothing"
        )


def _stated(
    frames: list[int | None], rate: list[int | None]
) -> tuple[list[int | None], list[int | None], list[str | None]]:
    """Lengths that a manifest states; half of a statement is none, an absurd one a problem."""
    problem: list[str | None] = [None] * len(frames)
    both = [n is not None and hz is not None for n, hz in zip(frames, rate, strict=True)]
    for row, stated in enumerate(both):
        n, hz = frames[row], rate[row]
        if not stated:
            frames[row] = rate[row] = None
        elif not (0 < (n or 0) <= MAX_FRAMES and MIN_RATE <= (hz or 0) <= MAX_RATE):
            problem[row] = f"the manifest states {n} frames at {hz} Hz: expected at least one, at 8000 … 192000 Hz"
            frames[row] = rate[row] = None
    return frames, rate, problem


def _id(name: str, start: float, end: float | None) -> str:
    return f"{name}#{start:g}-{end if end is not None else ''}" if start or end else name


def _read(path: Location) -> pa.Table:
    try:
        with path.open("rb") as file:
            if path.suffix == ".parquet":
                table = pq.read_table(path if isinstance(path, Path) else file)
            elif path.suffix == ".csv":  # in threads, Arrow at times aborts a process that ends soon after an error
                as_text = dict.fromkeys(COLUMNS, pa.string())
                convert = pa.csv.ConvertOptions(column_types=as_text, null_values=[""], strings_can_be_null=True)
                table = pa.csv.read_csv(file, pa.csv.ReadOptions(use_threads=False), convert_options=convert)
            else:
                table = _read_json(file)
        table.validate(full=True)  # pyarrow takes any bytes for text
        return _typed(table)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise UserError(f"manifest {path} cannot be read: {error}") from error


def _read_json(file: IO[bytes]) -> pa.Table:
    """Of columns that are not ours the names alone: what they hold may differ from line to line."""
    rows, names = [], dict[str, None]()
    for number, line in enumerate(file, 1):
        if line.strip():
            row = _object(line.decode("utf-8-sig" if number == 1 else "utf-8"), number)
            names |= dict.fromkeys(row)
            rows.append([row.get(name) for name in COLUMNS])
    if not rows:
        raise ValueError("it is empty")
    ours = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    nothing = pa.nulls(len(rows))
    return pa.table({name: _column(name, ours[name]) if name in ours else nothing for name in names})


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'line {number}: {line[:20]!r} is no object of one line, such as {{"path": "a.wav"}}')
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a column stands there more than once: {[name for name, _ in pairs]}")
    return found


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    """Numbers become text where some are: a speaker may be called 7 here and anna there."""
    if not pa.types.is_string(COLUMNS[name]) and not any(isinstance(value, str) for value in values):
        return pa.array(values)
    return pa.array([_text(value) if isinstance(value, (bool, int, float)) else value for value in values], pa.string())


def _text(value: float) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _typed(table: pa.Table) -> pa.Table:
    """The columns that we know, each of its type: a speaker 7 becomes "7", a start "0:05" is an error."""
    known = [name for name in table.column_names if name in COLUMNS]
    for name in known:
        if known.count(name) > 1:
            raise ValueError(f"column {name} stands there more than once")
        table = table.set_column(table.column_names.index(name), name, _cast(name, table[name]))
    return table


def _cast(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Raises ValueError naming the first row that cannot be had as such."""
    wanted = COLUMNS[name]
    if pa.types.is_string(column.type) and not pa.types.is_string(wanted):
        column = pc.utf8_trim_whitespace(column)

    def refused(row: int) -> bool:
        try:
            column.slice(0, row + 1).cast(wanted)
        except pa.ArrowInvalid:
            return True
        return False

    try:
        return column.cast(wanted)
    except pa.ArrowInvalid as error:
        row = bisect_left(range(len(column)), True, key=refused)
        raise ValueError(f"row {row + 1}: {name} is {column[row].as_py()!r}, expected {EXPECTED[wanted]}") from error
