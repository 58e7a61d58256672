"""A manifest: one row per recording, in Parquet, CSV or JSONL."""

from __future__ import annotations

import json
import math
import posixpath
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
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
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
EXPECTED = {pa.string(): "text", pa.float64(): "seconds, such as 5.25", pa.int64(): "a whole number"}
CSV = "a CSV is UTF-8, with commas between its columns"
JSONL = 'each line is one object in UTF-8, such as {"path": "a.wav"}'
MAX_FRAMES = 1 << 40
INSIDE_PARQUET = "recordings inside Parquet go through `just pack-parquet` first"


def read_manifest(path: Location) -> tuple[dict[str, list[Any]], Counter[str]]:
    """Columns as `pipeline.sources` names them, and what was ignored. Raises UserError naming row and value."""
    table = _read(path)
    ignored = Counter(f"column {name}" for name in table.column_names if name not in COLUMNS)
    for name in table.column_names:
        if name not in COLUMNS and (meant := name.strip().lower()) in COLUMNS.keys() - {*table.column_names}:
            raise UserError(f"{path}: its column {name!r} would be ignored: call it {meant!r}, or something else")
    if "path" not in table.column_names:
        hint = f"; {INSIDE_PARQUET}" if path.suffix == ".parquet" else ""
        raise UserError(f"{path} has no column named path; its columns are {table.column_names}{hint}")
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
    if "://" in name:
        return name
    if "://" in folder and not name.startswith("/"):
        return _inside(folder, name)
    path = posixpath.join(folder, name)
    if "/../" in path and "\0" not in path:
        path = posixpath.join(_without_dots(posixpath.dirname(path)), posixpath.basename(path))
    return posixpath.normpath(path)


def _inside(url: str, name: str) -> str:
    """A folder's file where . and .. would be names: in a bucket. What would lead out of it finds nothing."""
    if {".", ".."}.isdisjoint(name.split("/")):
        return f"{url}/{name}"
    scheme, _, bucket, *folders = url.split("/")
    return f"{scheme}//{bucket}/{posixpath.normpath('/'.join([*folders, name]))}"


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
                table = pq.ParquetFile(path if isinstance(path, Path) else file).read()
            elif path.suffix == ".csv":
                table = _read_csv(file)
            else:
                table = _read_json(file)
        table.validate(full=True)  # pyarrow takes any bytes for text
        return _typed(table)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise UserError(f"manifest {path} cannot be read: {' '.join(str(error).splitlines())}") from error


def _read_csv(file: IO[bytes]) -> pa.Table:
    as_text = dict.fromkeys(COLUMNS, pa.string())
    convert = pa.csv.ConvertOptions(column_types=as_text, null_values=[""], strings_can_be_null=True)
    one_thread = pa.csv.ReadOptions(use_threads=False)  # in threads, Arrow at times aborts a process after an error
    try:
        table = pa.csv.read_csv(file, one_thread, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{error} (row 1 is the header; {CSV})") from error
    if table.num_columns == 1 and any(mark in table.column_names[0] for mark in ";\t"):
        raise ValueError(f"its header is {table.column_names[0]!r} ({CSV})")
    return table


def _read_json(file: IO[bytes]) -> pa.Table:
    """Of columns that are not ours the names alone: what they hold may differ from line to line."""
    rows, names = [], dict[str, None]()
    for number, line in enumerate(file, 1):
        if line.strip():
            row = _object(line, number)
            names |= dict.fromkeys(row)
            rows.append([row.get(name) for name in COLUMNS])
    if not rows:
        raise ValueError("it is empty")
    ours = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    nothing = pa.nulls(len(rows))
    return pa.table({name: _column(name, ours[name]) if name in ours else nothing for name in names})


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}; {JSONL}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is {str(row)[:20]!r}; {JSONL}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a column stands there more than once: {[name for name, _ in pairs]}")
    return found


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    """Numbers become text where some are: a speaker may be called 7 here and anna there."""
    if not pa.types.is_string(COLUMNS[name]) and {*map(type, values)} <= {int, float, type(None)}:
        with suppress(OverflowError):  # as text, the row of what 64 bits cannot hold is found
            return pa.array(values)
    for row, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise _wrong(name, row, value)
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
    """Blanks around a value are not part of it, but for paths; a number that is blank is none, and 44100.0 is 44100."""
    wanted = COLUMNS[name]
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), wanted)])
    if pa.types.is_string(wanted):
        column = _as(wanted, name, column)
        return column if name == "path" else pc.utf8_trim_whitespace(column)
    if not any(is_type(column.type) for is_type in NUMBERS):
        # Arrow would take True for 1, and a date or a duration for its microseconds.
        if pa.types.is_duration(column.type):
            raise _wrong(name, *_first(column))
        column = pc.utf8_trim_whitespace(_as(pa.string(), name, column))
        column = pc.replace_substring_regex(column, r"^(.*\d)\.0*$", r"\1")
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    return _as(wanted, name, column)


def _as(wanted: pa.DataType, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Raises ValueError naming the first row that cannot be had as such."""

    def refused(row: int) -> bool:
        try:
            column.slice(0, row + 1).cast(wanted)
        except pa.ArrowInvalid:
            return True
        return False

    try:
        return column.cast(wanted)
    except pa.ArrowNotImplementedError as error:
        raise _wrong(name, *_first(column)) from error
    except pa.ArrowInvalid as error:
        row = bisect_left(range(len(column)), True, key=refused)
        raise _wrong(name, row, column[row].as_py()) from error


def _first(column: pa.ChunkedArray) -> tuple[int, object]:
    """The first row that holds something, and what."""
    row = pc.index(column.is_valid(), True).as_py()
    return row, column[row].as_py()


def _wrong(name: str, row: int, value: object) -> ValueError:
    return ValueError(f"row {row + 1}: {name} is {value!r}, expected {EXPECTED[COLUMNS[name]]}")
