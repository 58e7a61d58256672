"""Small shards, and what the checks say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.targets import flac_bytes
from shards.contract import (
    CODES_SUFFIX,
    INDEX_NAME,
    META_SUFFIX,
    OK,
    TARGET_SUFFIX,
    flatten_codes,
    npy_bytes,
    sample_key,
)
from shards.damage import problems, unlisted
from shards.index import read_sums, shard_list
from shards.writer import ShardWriter
from tests.test_contract import some_codes, some_meta

FINGERPRINT = {"plan_rows": "0", "snac": "some SNAC", "target_bits": 16}
SHARD = ("train", 0)


def some_members(row: int) -> dict[str, bytes]:
    target = np.random.default_rng(row).uniform(-0.5, 0.5, 4 * 4096).astype(np.float32)
    return {
        CODES_SUFFIX: npy_bytes(flatten_codes(some_codes(8, seed=row))),
        TARGET_SUFFIX: flac_bytes(target, 16),
        META_SUFFIX: json.dumps(some_meta(segment=row), sort_keys=True).encode(),
    }


def some_row(row: int) -> dict[str, Any]:
    return {"key": sample_key(0, row), "recording": "a/b.wav", "group": "a", "segment": row, "status": OK}


def write_shard(folder: Path, rows: int = 3, fingerprint: dict[str, Any] = FINGERPRINT) -> None:
    with ShardWriter(folder, 0, fingerprint) as writer:
        for row in range(rows):
            writer.add(some_row(row), some_members(row))
        writer.add_row({**some_row(rows), "status": "failed", "reason": "broken"})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def all_problems(shards: Path) -> list[str]:
    sums, listed = read_sums(shards), shard_list(shards)
    return [problem for shard in listed for problem in problems(shards, *shard, sums, shards / INDEX_NAME)] + list(
        unlisted(shards, listed)
    )
