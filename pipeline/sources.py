"""Find recordings: a folder tree or a manifest. Every file found ends in the plan, readable or not."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from codec.audio import EXTENSIONS
from shards.contract import SPLITS
from shards.errors import UserError

MANIFEST_TYPES = {
    "path": pa.string(),
    "id": pa.string(),
    "speaker": pa.string(),
    "split": pa.string(),
    "start": pa.float64(),  # seconds
    "end": pa.float64(),
}


@dataclass(frozen=True)
class Source:
    """A recording before anything is known of its content."""

    id: str
    path: str
    group: str
    split: str | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    problem: str | None = None


def find(audio: Path, group_pattern: str | None) -> tuple[list[Source], Counter[str]]:
    """The recordings of a folder or manifest, in order of their ids; and what was ignored, extensions or columns."""
    if audio.is_dir():
        sources, ignored = _folder(audio, group_pattern)
    elif audio.is_file():
        sources, ignored = _manifest(audio, group_pattern)
    else:
        raise UserError(f"audio={audio}: no such folder or manifest")
    if not sources:
        raise UserError(f"audio={audio} holds no recordings ({', '.join(sorted(EXTENSIONS))}); found {dict(ignored)}")
    sources.sort(key=lambda source: source.id)
    return sources, ignored


def _folder(folder: Path, group_pattern: str | None) -> tuple[list[Source], Counter[str]]:
    sources, ignored = [], Counter[str]()
    for path in _walk(folder):
        if path.suffix.lower() not in EXTENSIONS:
            ignored[path.suffix.lower() or path.name] += 1
            continue
        id = path.relative_to(folder).as_posix()
        try:
            str(path).encode()
        except UnicodeEncodeError:  # such a name fits in no Parquet file
            name = os.fsencode(id).decode("utf-8", "backslashreplace")
            sources.append(Source(name, "", _group(name, group_pattern), problem="file name is not UTF-8: rename it"))
            continue
        sources.append(Source(id, str(path), _group(id, group_pattern)))
    return sources, ignored


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below `folder`; links to folders are followed, each folder is entered once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(root, file) for file in files)


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}") from error


def _manifest(path: Path, group_pattern: str | None) -> tuple[list[Source], Counter[str]]:
    table = _read_table(path)
    ignored = Counter(f"column {name}" for name in table.column_names if name not in MANIFEST_TYPES)
    if "path" not in table.column_names:
        raise UserError(f"{path} has no column named path; its columns are {table.column_names}")
    sources = []
    for number, row in enumerate(table.to_pylist(), start=1):
        where = f"{path}, row {number}"
        if not row["path"]:
            raise UserError(f"{where}: path is empty")
        if row.get("split") not in (None, "", *SPLITS):
            raise UserError(f"{where}: split is {row['split']!r}, expected one of {', '.join(SPLITS)}, or nothing")
        sources.append(_from_row(row, path.parent, group_pattern))
    repeated = [id for id, n in Counter(source.id for source in sources).items() if n > 1]
    if repeated:
        raise UserError(f"{path}: id {repeated[0]!r} stands more than once ({len(repeated)} such): ids must be unique")
    return sources, ignored


def _from_row(row: dict[str, str | float | None], folder: Path, group_pattern: str | None) -> Source:
    name = str(row["path"])
    start, end = float(row.get("start") or 0.0), row.get("end")
    id = str(row.get("id") or (f"{name}#{start:g}-{end if end is not None else ''}" if start or end else name))
    problem = None
    if not (0 <= start < (math.inf if end is None else float(end))):
        problem = f"start {start:g} s and end {end} s are not a stretch of time"
    return Source(
        id=id,
        path=str(folder / name),
        group=str(row.get("speaker") or _group(name if group_pattern is None else id, group_pattern)),
        split=str(row["split"]) if row.get("split") else None,
        start_seconds=start,
        end_seconds=None if end is None else float(end),
        problem=problem,
    )


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return _typed(pq.read_table(path))
        if path.suffix == ".csv":
            convert = pa.csv.ConvertOptions(column_types=MANIFEST_TYPES, null_values=[""], strings_can_be_null=True)
            return pa.csv.read_csv(path, convert_options=convert)
        if path.suffix in (".jsonl", ".ndjson"):
            return _typed(pa.json.read_json(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"manifest {path} cannot be read: {error}") from error
    raise UserError(f"audio={path} is neither a folder nor a manifest (.parquet, .csv, .jsonl)")


def _typed(table: pa.Table) -> pa.Table:
    """The columns that we know, each of its type: a speaker 7 becomes "7", a start "x" is an error."""
    known = [name for name in table.column_names if name in MANIFEST_TYPES]
    for name in known:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(MANIFEST_TYPES[name]))
    return table


def _group(id: str, pattern: str | None) -> str:
    if pattern is None:
        return str(PurePosixPath(id).parent)
    try:
        match = re.search(pattern, id)
    except re.error as error:
        raise UserError(f"group_pattern={pattern}: {error}") from error
    if not match or not match.groups() or match[1] is None:
        raise UserError(
            f"group_pattern={pattern} names no group in {id!r}: it needs one pair of parentheses that match"
        )
    return match[1]
