"""One shard, written so that it is either complete under its final name or not there at all."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.contract import FORMAT_VERSION, SIDECAR_SCHEMA
from shards.errors import ShardError, first_line
from shards.files import NotOursError, check_is_ours, file_sha256, move, replacing
from shards.pieces import Fetched
from shards.storage import Location, Url

FOOTER_BYTES = 1 << 16  # fetched of a remote table's end; footers of shards are shorter
ARROW_KEY = b"ARROW:schema"
AHEAD = ".next"  # at the end of a sidecar's name whose tar may not stand yet


def write_table(path: Location, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """A Parquet file whose schema metadata holds `metadata`, each value as JSON."""
    table = table.replace_schema_metadata(encode_metadata(metadata))
    with replacing(path) as temporary, temporary.open("wb") as file:  # pyarrow's does not say why it cannot be closed
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def encode_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}


def read_footer(path: Location | Fetched) -> pq.FileMetaData | None:
    """None where there is no such file. Raises ShardError for one that is damaged. Remote: one request, of its end."""
    with naming(path), suppress(FileNotFoundError), _end(path) if isinstance(path, Url) else path.open("rb") as file:
        return pq.read_metadata(file)
    return None


def _end(url: Url) -> io.BytesIO:
    """Enough of a Parquet file to hold its footer, whose length stands before its last four bytes."""
    end = url.read_bytes(-FOOTER_BYTES)
    length = int.from_bytes(end[-8:-4], "little") + 8
    return io.BytesIO(end if length <= len(end) else url.read_bytes(-length))


def told_by(path: Location | Fetched, footer: pq.FileMetaData | None) -> dict[str, Any]:
    """The metadata that `write_table` stored. Raises ShardError for a file that is not such a table, or not there."""
    with naming(path):
        if footer is None:
            raise FileNotFoundError("no such file")
        return {key.decode(): json.loads(value) for key, value in (footer.metadata or {}).items() if key != ARROW_KEY}


def read_metadata(path: Location | Fetched) -> dict[str, Any]:
    return told_by(path, read_footer(path))


def fingerprint_of(path: Location | Fetched, told: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says that it was made from; nothing where it does not say. Raises ShardError for what is no such."""
    found = told.get("fingerprint", {})
    if not isinstance(found, dict):
        raise ShardError(f"{path}: its fingerprint is {found!r}; delete it and run its stage again")
    return found


def may_hold(footer: pq.FileMetaData, column: str, value: str) -> bool:
    """Whether the least and the greatest value of a column leave room for this one."""
    place = footer.schema.names.index(column)
    found = [footer.row_group(number).column(place).statistics for number in range(footer.num_row_groups)]
    return any(not known or not known.has_min_max or known.min <= value <= known.max for known in found)


def read_table(path: Location | Fetched, **options: Any) -> pa.Table:
    """`pyarrow.parquet.read_table`. Raises ShardError for a file that is damaged."""
    with naming(path):
        table = pq.read_table(parquet_source(path), page_checksum_verification=True, **options)
        table.validate(full=True)  # pyarrow takes any bytes for text
        return table


def parquet_source(path: Location | Fetched) -> Path | IO[bytes]:
    """What pyarrow reads it from: a remote table is fetched whole."""
    if isinstance(path, Path):
        return path
    return io.BytesIO(path.read_bytes()) if isinstance(path, Url) else path.open("rb")


@contextmanager
def naming(path: Location | Fetched) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file into a ShardError that names it."""
    try:
        yield
    except (pa.ArrowException, ValueError, OSError, MemoryError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            error.filename = error.filename or str(path)  # which it says only of what cannot be opened
            raise
        is_missing = isinstance(error, FileNotFoundError)  # pyarrow's has no number
        damaged = f"damaged, or no file of ours ({first_line(error)}): if it is ours, delete it and run its stage again"
        raise ShardError(f"{path}: {'missing: run its stage again' if is_missing else damaged}") from error


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """`segment_length is 4.0, now 2.0`, for every key that differs; empty when nothing does. Of what is nested in both,
    only what differs is said.
    """
    said = []
    for key in {**found, **expected}:
        was, now = found.get(key), expected.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            said += [f"{key}: {nested}" for nested in [differences(was, now)] if nested]
        elif was != now:
            said.append(f"{key} is {was}, now {now}")
    return "; ".join(said)


def check_columns(path: Location | Fetched, found: pa.Schema, expected: pa.Schema) -> None:
    """Raises ShardError saying how they differ."""
    if found != expected:
        columns = ({field.name: field.type for field in schema} for schema in (expected, found))
        raise ShardError(f"{path}: its columns are not those of its kind ({differences(*columns) or 'their order'})")


def standing(path: Location, fingerprint: Mapping[str, Any]) -> pq.FileMetaData | None:
    """The footer of the table at `path`, None where there is none. Raises ShardError when another run made it."""
    footer = read_footer(path)
    if footer is None:
        return None
    changed = differences(fingerprint_of(path, told_by(path, footer)), fingerprint)
    if changed:
        raise ShardError(
            f"{path} was made by another run ({changed}): use the settings of that run, or a second work folder with "
            f"the same plan (docs/scale.md); or delete {path.parent.parent} to make all of it again"
        )
    return footer


class ShardWriter:
    """Collects samples into `folder/000000.tar` and rows into `folder/000000.parquet`; leaving commits both.

    The sidecar takes its name last: a shard is done when its sidecar stands. Before the tar takes its own, the sidecar
    is whole under a name with AHEAD: where a shard is made again, a kill between the two leaves `finish` its work.
    Its schema metadata holds `about` too.
    """

    def __init__(
        self, folder: Location, shard: int, fingerprint: Mapping[str, Any], about: Mapping[str, Any] | None = None
    ) -> None:
        self.tar_path = folder / f"{shard:06d}.tar"
        self.sidecar_path = folder / f"{shard:06d}.parquet"
        self._ahead = self.sidecar_path.with_name(self.sidecar_path.name + AHEAD)
        self._about = {"fingerprint": fingerprint, **(about or {})}
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._temporary = stack.enter_context(replacing(self.tar_path))
            self._file = stack.enter_context(self._temporary.open("w+b"))
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
            self._open = stack.pop_all()
        return self

    def add(self, row: dict[str, Any], members: Mapping[str, bytes]) -> None:
        """A sample: its sidecar row (without offset, length, crc32) and its members by suffix."""
        offset = self._tar.offset
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{row['key']}.{suffix}")  # mtime 0, mode 0644, no owner: same input, same bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        length = self._tar.offset - offset
        self._file.flush()
        crc = zlib.crc32(os.pread(self._file.fileno(), length, offset))
        self._rows.append({**row, "offset": offset, "length": length, "crc32": crc})

    def add_row(self, row: dict[str, Any]) -> None:
        """A segment without a sample: its row says why."""
        self._rows.append(row)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._open.__exit__(kind, error, trace)
            return
        try:
            with self._open:  # a disk that is full only now leaves nothing behind either
                self._tar.close()
                self._file.flush()
                check_is_ours(self._file, self._temporary)
                metadata = {
                    "format_version": FORMAT_VERSION,
                    "tar_bytes": self._temporary.stat().st_size,
                    "tar_sha256": file_sha256(self._temporary),
                    **self._about,
                }
                write_table(self._ahead, pa.Table.from_pylist(self._rows, schema=SIDECAR_SCHEMA), metadata)
        except NotOursError:  # nor is what may stand there ahead
            raise
        except BaseException:
            self._ahead.unlink(missing_ok=True)
            raise
        move(self._ahead, self.sidecar_path)


def finish(path: Location) -> None:
    """What a killed process left with AHEAD in its name becomes the sidecar when its tar stands, and goes when not."""
    sidecar = path.with_name(path.name.removesuffix(AHEAD))
    tar = sidecar.with_suffix(".tar")
    if tar.exists() and file_sha256(tar) == read_metadata(path).get("tar_sha256"):
        move(path, sidecar)
    else:
        path.unlink(missing_ok=True)
