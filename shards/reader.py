"""One sample by (shard, offset, length), checked; and a WebDataset source that yields samples in training order."""

from __future__ import annotations

import io
import os
import tarfile
import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import soundfile

from shards.contract import CODES_SUFFIX, META_SUFFIX, TARGET_SUFFIX, check_meta, check_sample, load_codes
from shards.errors import ShardError
from shards.order import Order, rank_slice

if TYPE_CHECKING:
    from shards.index import Index

READ_ATTEMPTS = 3


def split_members(data: bytes, key: str) -> dict[str, bytes]:
    """A sample's stretch of the tar → its members by suffix."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * tarfile.BLOCKSIZE)), mode="r:") as tar:
            members = {info.name: tar.extractfile(info) for info in tar}
    except tarfile.TarError as error:
        raise ShardError(f"not a tar: {error}") from error
    expected = {f"{key}.{suffix}": suffix for suffix in (CODES_SUFFIX, TARGET_SUFFIX, META_SUFFIX)}
    if members.keys() != expected.keys():
        raise ShardError(f"holds {sorted(members)}, expected {sorted(expected)}")
    return {expected[name]: member.read() if member else b"" for name, member in members.items()}


def decode_sample(members: dict[str, Any]) -> dict[str, Any]:
    """Members as bytes → `codes` (T, 7) int16, `target` float32 in [−1, 1) and `meta`, checked against the contract."""
    meta = check_meta(members[META_SUFFIX])
    codes_T7 = load_codes(members[CODES_SUFFIX])
    try:
        target, rate = soundfile.read(io.BytesIO(members[TARGET_SUFFIX]), dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ShardError(f"target is not readable FLAC: {error}") from error
    check_sample(codes_T7, len(target), rate, meta)
    return {"codes": codes_T7, "target": target, "meta": meta}


def read_sample(index: Index, sample: int) -> dict[str, Any]:
    """Sample number `sample` of the index as {suffix: bytes} with `__key__` and `__url__`.

    Raises ShardError naming shard and key when its bytes cannot be had, or are not those of the index.
    """
    row = {name: index.table[name][sample].as_py() for name in ("shard", "key", "offset", "length", "crc32")}
    path = index.folder / index.split / f"{row['shard']:06d}.tar"
    trouble = ""
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(0.1 * 2**attempt)
        try:
            with path.open("rb") as tar:
                data = os.pread(tar.fileno(), row["length"], row["offset"])
        except OSError as error:
            trouble = str(error)
            continue
        if zlib.crc32(data) == row["crc32"]:
            return {"__key__": row["key"], "__url__": str(path), **split_members(data, row["key"])}
        trouble = f"crc32 of {len(data)} bytes at {row['offset']} differs from the index"
    raise ShardError(f"{path}: {row['key']}: {trouble} ({READ_ATTEMPTS} attempts); `just verify` lists what is damaged")


class OrderedSamples:
    """A source for `wds.DataPipeline`: this rank's samples of each global batch from `first_step` on, in order.

    DataLoader workers take whole batches in turn, so the loader hands them on in order whatever their number.
    """

    def __init__(self, index: Index, order: Order, steps: range, rank: int, world_size: int) -> None:
        self.index, self.order, self.steps = index, order, steps
        self.rank, self.world_size = rank, world_size

    def __call__(self) -> Iterator[dict[str, Any]]:
        from webdataset.utils import pytorch_worker_info

        _, _, worker, workers = pytorch_worker_info()
        places = rank_slice(self.order.global_batch, self.rank, self.world_size)
        for step in self.steps[worker::workers]:
            batch = self.order.batch(step)
            for place in places:
                position, sample = batch[place]
                yield {**read_sample(self.index, sample), "position": position}
