"""Are shards what their index says? Every sidecar, tar and sample is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from shards.contract import OK, SAID_TWICE, SUMS_NAME, tar_path
from shards.errors import ShardError
from shards.files import file_sha256, sha256_of
from shards.index import common, index_rows, read_sidecar, sidecar_metadata, wrong_key, wrong_place
from shards.pieces import Fetched, nearby
from shards.reader import decode_sample, sample_at
from shards.storage import Location, Url
from shards.writer import differences, fingerprint_of, read_metadata, read_table


def unlisted(folder: Location, shards: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Shards that stand in `folder` although its index, which lists `shards`, does not know them."""
    known = {tar_path(folder, split, shard) for split, shard in shards}
    for path in folder.files() if isinstance(folder, Url) else sorted(folder.glob("*/*")):
        if (
            path.parent.parent == folder
            and path.suffix in (".tar", ".parquet")
            and path.with_suffix(".tar") not in known
        ):
            yield f"{path}: not in the index: run `just shard-targets` to its end"


def problems(folder: Location, split: str, shard: int, sums: Mapping[str, str], index: Path | Fetched) -> Iterator[str]:
    """What is wrong with one shard: index against sidecar, sidecar against tar, every sample against the contract.

    `sums` are those of `read_sums`, `index` is the folder's, on this machine. Remote tars are fetched, each as a whole.
    """
    path = tar_path(folder, split, shard)
    chosen = (pc.field("split") == split) & (pc.field("shard") == shard)
    try:
        sidecar = read_sidecar(folder, split, shard)
        metadata = sidecar_metadata(sidecar)
        rows = index_rows(sidecar, split, shard)
        indexed = read_table(index, filters=chosen)
        made_by = fingerprint_of(index, read_metadata(index))
    except ShardError as error:
        yield str(error)
        return
    for file, digest in ((path.with_suffix(".parquet"), file_sha256(sidecar)), (path, metadata["tar_sha256"])):
        if sums.get(f"{split}/{file.name}") != digest:
            yield f"{file}: its sha256 is not that of {SUMS_NAME}"
    trusted = indexed.replace_schema_metadata(None).equals(rows.replace_schema_metadata(None))
    if not trusted:
        yield f"{sidecar}: its rows are not those of the index"
    elif wrong := wrong_key(rows["key"]) or wrong_place(rows.filter(pc.field("status") == OK)):
        yield f"{sidecar}: {wrong}"
        return
    changed = differences(common(metadata["fingerprint"]), made_by)
    if changed:
        yield f"{sidecar}: made by another run than the index ({changed})"
    try:
        with nearby(path) as local, local.open("rb") as tar:
            yield from _of_tar(tar, path, metadata)
            if trusted:
                yield from _of_samples(tar, path, rows.filter(pc.field("status") == OK))
    except FileNotFoundError:
        yield f"{path}: missing"


def _of_tar(tar: IO[bytes], path: Location, metadata: Mapping[str, Any]) -> Iterator[str]:
    size = os.fstat(tar.fileno()).st_size
    if size != metadata["tar_bytes"]:
        yield f"{path}: {size} bytes, its sidecar says {metadata['tar_bytes']}"
    elif sha256_of(tar) != metadata["tar_sha256"]:
        yield f"{path}: its sha256 is not the sidecar's"


def _of_samples(tar: IO[bytes], path: Location, rows: pa.Table) -> Iterator[str]:
    for row in rows.to_pylist():
        try:
            meta = decode_sample(sample_at(tar, row, path))["meta"]
        except ShardError as error:
            yield str(error)
            continue
        both = meta.keys() & SAID_TWICE
        if changed := differences({name: meta[name] for name in both}, {name: row[name] for name in both}):
            yield f"{path}: {row['key']}: its json differs from its row: {changed}"
