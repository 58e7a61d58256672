"""Sidecars → one index.parquet that readers trust."""

from __future__ import annotations

import hashlib
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.cache import ShardCache, default_cache
from shards.contract import (
    FORMAT_VERSION,
    INDEX_NAME,
    INDEX_SCHEMA,
    OK,
    SIDECAR_SCHEMA,
    SPLITS,
    SUMS_NAME,
    tar_path,
)
from shards.errors import ShardError
from shards.files import file_sha256, replacing, sha256_of, write_whole
from shards.pieces import Fetched
from shards.storage import READERS, Location, Url
from shards.writer import (
    check_columns,
    encode_metadata,
    fingerprint_of,
    naming,
    read_metadata,
    read_table,
    told_by,
)

GROUP_ROWS = 1 << 16  # of an index in memory at once
MAX_SAMPLE_BYTES = 1 << 30
KEY_PATTERN = r"^\d{6,}-\d{5,}$"  # of `sample_key`: keys name files, and nothing else may stand in one


def compact(
    folder: Location,
    shards: Sequence[tuple[str, int]],
    about: Mapping[str, Any] | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Location:
    """All sidecars of `shards`, in that order, into `folder/index.parquet`; each read once, READERS at a time. After
    each, `advance` is called.

    Its schema metadata holds what their fingerprints have in common, and `about`. SHA256SUMS, last,
    names tars, sidecars and index. Raises ShardError for a remote tar that is not its sidecar's.
    """
    path = folder / INDEX_NAME
    fingerprint = sidecar_metadata(read_sidecar(folder, *shards[0]))["fingerprint"]
    metadata = {"format_version": FORMAT_VERSION, "fingerprint": common(fingerprint), **(about or {})}
    schema = INDEX_SCHEMA.with_metadata(encode_metadata(metadata))
    sums: dict[str, str] = {}

    def rows() -> Iterator[pa.Table]:
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(shards), READERS):
                some = shards[start : start + READERS]
                for (split, shard), (sidecar, table) in zip(some, pool.map(of_shard, some), strict=True):
                    sums[f"{split}/{shard:06d}.tar"] = sidecar_metadata(sidecar)["tar_sha256"]
                    sums[f"{split}/{shard:06d}.parquet"] = file_sha256(sidecar)
                    yield table
                    advance()

    def of_shard(place: tuple[str, int]) -> tuple[Fetched, pa.Table]:
        sidecar, tar = read_sidecar(folder, *place), tar_path(folder, *place)
        table = index_rows(sidecar, *place)
        if isinstance(tar, Url):
            check_end(tar, table, sidecar_metadata(sidecar)["tar_bytes"])
        return sidecar, table

    with replacing(path) as temporary:
        write_index(temporary, schema, rows())
        digest = file_sha256(temporary)
    write_sums(folder, {INDEX_NAME: digest, **sums})
    return path


def check_end(tar: Url, rows: pa.Table, tar_bytes: int) -> None:
    """Raises ShardError where the tar's last sample is not the sidecar's: without locks, one of two runs that make a
    shard at once may be the last with the tar, the other with the sidecar. One request; what lies before that sample
    has the same length where it has the same place, and `just verify` reads it all.
    """
    samples = rows.select(["offset", "length", "crc32"]).filter(pc.field("offset").is_valid())
    if not len(samples):
        return
    last = samples.slice(len(samples) - 1).to_pylist()[0]
    end = tar.read_bytes(last["offset"] - tar_bytes)
    if zlib.crc32(end[: last["length"]]) != last["crc32"]:
        raise ShardError(
            f"{tar}: its last sample is not its sidecar's, as where two runs made it at once: delete the tar, and the "
            "same command makes its shard anew"
        )


def forget(folder: Location) -> None:
    """Takes away an index that is about to be wrong."""
    for name in (SUMS_NAME, INDEX_NAME):
        (folder / name).unlink(missing_ok=True)


def write_index(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Row groups of GROUP_ROWS or more: their descriptions alone would fill a reader's memory, were they shards'."""
    with (
        path.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        waiting: list[pa.Table] = []
        for table in tables:
            waiting.append(table.replace_schema_metadata(schema.metadata))
            if sum(map(len, waiting)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def write_sums(folder: Location, sums: Mapping[str, str]) -> None:
    write_whole(folder / SUMS_NAME, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def read_sums(folder: Location) -> dict[str, str]:
    """Name below the folder → sha256, as `sha256sum --check` reads them. Raises ShardError."""
    path = folder / SUMS_NAME
    if not path.exists():
        raise ShardError(f"{path} is missing: run `just shard-targets` to its end")
    with naming(path):
        text = path.read_bytes().decode("ascii", "replace")
    lines = text.split("\n")[:-1]
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w./-]+)", line) for line in lines]
    if not lines or not all(matches) or not text.endswith("\n"):
        raise ShardError(f"{path}: damaged, or not made by `just shard-targets`; run it again")
    return {match[2]: match[1] for match in matches if match}


def check_index(folder: Location, cache: ShardCache | None = None) -> dict[str, str]:
    """What `read_sums` says. Raises ShardError for an index that is missing, of another format or not the one named."""
    file, sums = _opened(folder, cache or default_cache())
    file.close()
    return sums


def _opened(folder: Location, cache: ShardCache) -> tuple[IO[bytes], dict[str, str]]:
    """The index, checked, and what `read_sums` says: its name may be another's when it is opened again."""
    path = folder / INDEX_NAME
    if not path.exists():
        inside = folder / "shards"
        place = inside if (inside / INDEX_NAME).exists() else "the folder that holds it"
        raise ShardError(f"{path} is missing: run `just shard-targets` to its end, or name {place}")
    try:
        return _checked(folder, cache)
    except ShardError:
        if isinstance(path, Path):
            raise
        cache.discard(path)  # it may be of an index that was there before
        return _checked(folder, cache)


def _checked(folder: Location, cache: ShardCache) -> tuple[IO[bytes], dict[str, str]]:
    path = folder / INDEX_NAME
    with ExitStack() as stack:
        file = stack.enter_context(cache.open(path))
        with naming(path):
            found = told_by(path, pq.read_metadata(file)).get("format_version")
        if found != FORMAT_VERSION:
            raise ShardError(f"{path} has format {found}, this version reads {FORMAT_VERSION}")
        sums = read_sums(folder)
        file.seek(0)
        with naming(path):
            digest = sha256_of(file)
        if sums.get(INDEX_NAME) != digest:
            raise ShardError(f"{path}: its sha256 is not that of {SUMS_NAME}; run `just shard-targets` again")
        stack.pop_all()
        return file, sums


@dataclass(frozen=True)
class Index:
    """The usable samples of one split, in shard order."""

    folder: Location
    split: str
    table: pa.Table  # rows with status ok
    shards: tuple[int, ...]
    counts: tuple[int, ...]  # samples of each shard
    sha256: str
    fingerprint: dict[str, Any]
    cache: ShardCache  # where remote shards are read from, and the index was

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def samples_sha256(self) -> str:
        """Identifies its samples and their lengths: what the order of training and its crops follow from. The same
        where a damaged shard was made anew, or the index was written again.
        """
        digest = hashlib.sha256()
        for keys in self.table["key"].chunks:
            digest.update("".join(f"{key}\n" for key in keys.to_pylist()).encode())
        for name in ("n_coarse", "n_samples"):
            digest.update(self.table[name].to_numpy().astype("<i4").tobytes())
        return digest.hexdigest()


def load(folder: Location, split: str, cache: ShardCache | None = None) -> Index:
    """Raises ShardError when there is no index, or one of another format."""
    path, cache = folder / INDEX_NAME, cache or default_cache()
    file, sums = _opened(folder, cache)
    with file, naming(path):
        table, counts = _mapped(path, file, split)
        told = told_by(path, pq.read_metadata(file))
    return Index(
        folder=folder,
        split=split,
        table=table,
        shards=tuple(sorted(counts)),
        counts=tuple(counts[shard] for shard in sorted(counts)),
        sha256=sums[INDEX_NAME],
        fingerprint=fingerprint_of(path, told),
        cache=cache,
    )


def _mapped(path: Location, index: IO[bytes], split: str) -> tuple[pa.Table, Counter[int]]:
    """The usable rows, streamed into a file without a name and mapped from there; and how many each shard has.

    So memory does not grow with the index, and the processes that read ahead share what is looked up.
    """
    columns = ["shard", "key", "offset", "length", "crc32", "n_coarse", "n_samples"]
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in columns])
    counts = Counter[int]()
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_file(file.name, schema) as written, pq.ParquetFile(index) as parquet:
            check_columns(path, parquet.schema_arrow, INDEX_SCHEMA)
            for rows in parquet.iter_batches(GROUP_ROWS, columns=[*columns, "split", "status"]):
                usable = rows.filter(pc.and_(pc.equal(rows["split"], split), pc.equal(rows["status"], OK)))
                usable.validate(full=True)  # pyarrow takes any bytes for text
                if wrong := wrong_key(usable["key"]) or wrong_place(usable):
                    raise ValueError(wrong)
                written.write_batch(usable.select(columns))
                for found in usable["shard"].value_counts().to_pylist():
                    counts[found["values"]] += found["counts"]
        pa.default_memory_pool().release_unused()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all(), counts


def wrong_key(keys: pa.Array | pa.ChunkedArray) -> str | None:
    """What is said of the first key that is none of `sample_key`."""
    place = pc.index(pc.match_substring_regex(keys, KEY_PATTERN), False).as_py()
    return None if place < 0 else f"{keys[place].as_py()!r} is no key of a sample"


def wrong_place(usable: pa.Table | pa.RecordBatch) -> str | None:
    """What is said of rows with a sample that do not say where it is."""
    for name in ("offset", "length", "crc32", "n_coarse", "n_samples"):
        low, high = pc.min_max(usable[name]).as_py().values()
        if usable[name].null_count:
            return f"{name} is missing where the status is {OK}"
        if low is not None and (low < 0 or (name == "length" and high > MAX_SAMPLE_BYTES)):
            return f"{name} is {low if low < 0 else high}"
    return None


def shard_list(folder: Location) -> list[tuple[str, int]]:
    """(split, shard) of every shard in the index, in its order. Raises ShardError for what would lie elsewhere."""
    table = read_table(folder / INDEX_NAME, columns=["split", "shard"])
    places = table.append_column("place", pa.array(np.arange(len(table))))
    shards = places.group_by(["split", "shard"]).aggregate([("place", "min")]).sort_by("place_min")
    found = list(zip(shards["split"].to_pylist(), shards["shard"].to_pylist(), strict=True))
    for split, shard in found:
        if split not in SPLITS or shard is None or shard < 0:
            raise ShardError(f"{folder / INDEX_NAME}: {(split, shard)} is no shard")
    return found


def listed(shards: Sequence[tuple[str, int]]) -> Iterator[str]:
    """The names in SHA256SUMS, in its order."""
    yield INDEX_NAME
    for split, shard in shards:
        yield from (f"{split}/{shard:06d}.tar", f"{split}/{shard:06d}.parquet")


def read_sidecar(folder: Location, split: str, shard: int) -> Fetched:
    path = tar_path(folder, split, shard).with_suffix(".parquet")
    try:
        with naming(path):
            return Fetched(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ShardError(f"{path}: missing; run `just shard-targets` again") from error


def sidecar_metadata(sidecar: Fetched) -> dict[str, Any]:
    metadata = read_metadata(sidecar)
    lacking = {"format_version", "tar_bytes", "tar_sha256", "fingerprint"} - metadata.keys()
    fingerprint_of(sidecar, metadata)
    if lacking:
        raise ShardError(
            f"{sidecar}: its schema metadata lacks {', '.join(sorted(lacking))}; delete it and make it again"
        )
    if metadata["format_version"] != FORMAT_VERSION:
        raise ShardError(f"{sidecar} has format {metadata['format_version']}, this version reads {FORMAT_VERSION}")
    return metadata


def common(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What the fingerprints of all shards of a run have in common."""
    return {key: value for key, value in fingerprint.items() if key != "plan_rows"}


def index_rows(sidecar: Fetched, split: str, shard: int) -> pa.Table:
    rows = read_table(sidecar)
    check_columns(sidecar, rows.schema, SIDECAR_SCHEMA)
    where = [pa.array([split] * len(rows), pa.string()), pa.array([shard] * len(rows), pa.int32())]
    return pa.table([*where, *rows.columns], schema=INDEX_SCHEMA)
