"""One sample by (shard, offset, length), checked."""

from __future__ import annotations

import io
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shards.contract import (
    COARSE_48K,
    CODES_SUFFIX,
    META_SUFFIX,
    TARGET_SUFFIX,
    check_meta,
    check_sample,
    load_codes,
    tar_path,
)
from shards.errors import ShardError
from shards.flac import Flac
from shards.storage import Location, StorageError
from shards.stretch import read_at

if TYPE_CHECKING:
    from shards.index import Index

READ_ATTEMPTS = 3


def split_members(data: bytes, key: str, path: Location) -> dict[str, Any]:
    """A sample's stretch of the tar → {suffix: bytes} with `__key__` and `__url__`. Raises ShardError naming both."""
    expected = {f"{key}.{suffix}": suffix for suffix in (CODES_SUFFIX, TARGET_SUFFIX, META_SUFFIX)}
    try:
        with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
            infos = tar.getmembers()
        names = sorted(info.name if info.isreg() else f"{info.name} (no plain file)" for info in infos)
        if names != sorted(expected):
            raise ShardError(f"{path}: {key}: holds {names}, expected {sorted(expected)}")
        ends = {info.name: info.offset_data + info.size for info in infos}
        if max(ends.values()) > len(data):
            raise ShardError(f"{path}: {key}: ends after {len(data)} of {max(ends.values())} bytes")
        members = {expected[info.name]: data[info.offset_data : ends[info.name]] for info in infos}
    except (tarfile.TarError, OverflowError) as error:
        raise ShardError(f"{path}: {key}: not a whole tar: {error}") from error
    return {"__key__": key, "__url__": str(path), **members}


def sample_at(tar: IO[bytes], row: Mapping[str, Any], path: Location) -> dict[str, Any]:
    """What `split_members` makes of a row's stretch of an open tar. Raises ShardError naming shard and key."""
    data = read_at(tar, row["offset"], row["length"])
    if zlib.crc32(data) != row["crc32"]:
        raise ShardError(f"{path}: {row['key']}: crc32 differs")
    return split_members(data, row["key"], path)


def _whole(meta: dict[str, Any]) -> range:
    return range(meta["n_coarse"])


def decode_sample(
    members: dict[str, Any],
    part: Callable[[dict[str, Any]], range] = _whole,
    into: npt.NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Members as `split_members` gives them → `codes` (T, 7) int16, `target` float32 in [−1, 1) and `meta`.

    Of the target only the coarse tokens are decoded that `part` chooses, given `meta`; the codes are all there.
    With `into` the target is its front.
    Raises ShardError naming shard and key when they are not as the contract says.
    """
    try:
        meta = check_meta(members[META_SUFFIX])
        codes_T7 = load_codes(members[CODES_SUFFIX])
        flac = Flac(members[TARGET_SUFFIX])
        check_sample(codes_T7, flac.frames, flac.rate, meta)
        tokens = part(meta)
        target = flac.read(tokens.start * COARSE_48K, len(tokens) * COARSE_48K, into)
    except ShardError as error:
        raise ShardError(f"{members['__url__']}: {members['__key__']}: {error}") from error
    return {"codes": codes_T7, "target": target, "meta": meta}


def read_sample(index: Index, sample: int) -> dict[str, Any]:
    """Sample number `sample` of the index as {suffix: bytes} with `__key__` and `__url__`.

    Raises ShardError naming shard and key when its bytes cannot be had, or are not those of the index.
    """
    row = {name: index.table[name][sample].as_py() for name in ("shard", "key", "offset", "length", "crc32")}
    path = tar_path(index.folder, index.split, row["shard"])
    trouble = ""
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(0.1 * 2**attempt)
        try:
            with index.cache.open(path) as tar:
                data = os.pread(tar.fileno(), row["length"], row["offset"])
        except (OSError, StorageError) as error:
            trouble = str(error)
            continue
        if zlib.crc32(data) == row["crc32"]:
            return split_members(data, row["key"], path)
        index.cache.discard(path)
        trouble = f"crc32 of {len(data)} bytes at {row['offset']} differs from the index"
    raise ShardError(f"{path}: {row['key']}: {trouble} ({READ_ATTEMPTS} attempts); `just verify` lists what is damaged")
