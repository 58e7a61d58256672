"""Does the trainer's memory grow with the corpus? Resident size with indexes of a thousand to ten million segments.

Usage: python -m benchmarks.index_memory. Each size has a process of its own, which loads the index, makes the order and
looks up 200 global batches of 32 in the second epoch, as a worker that reads ahead does (without reading the tars).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.harness import peak_mib, report
from shards.contract import FORMAT_VERSION, INDEX_NAME, INDEX_SCHEMA, OK, sample_key
from shards.files import file_sha256
from shards.index import load, write_index, write_sums
from shards.order import Order
from shards.storage import locate
from shards.stream import Stage, Stream
from shards.writer import encode_metadata

SIZES = (1_000, 100_000, 1_000_000, 10_000_000)
PER_SHARD = 1000
BATCH = 32


def make_index(folder: Path, rows: int) -> None:
    metadata = {"format_version": FORMAT_VERSION, "fingerprint": {"teacher": "none"}}
    schema = INDEX_SCHEMA.with_metadata(encode_metadata(metadata))
    folder.mkdir()
    write_index(folder / INDEX_NAME, schema, map(_shard, range(rows // PER_SHARD)))
    write_sums(folder, {INDEX_NAME: file_sha256(folder / INDEX_NAME)})


def _shard(shard: int) -> pa.Table:
    places = np.arange(PER_SHARD)
    columns = {
        "split": ["train"] * PER_SHARD,
        "shard": np.full(PER_SHARD, shard, np.int32),
        "key": [sample_key(shard, place) for place in places.tolist()],
        "recording": [f"speaker_{shard % 997}/recording_{shard}_{place}.flac" for place in places.tolist()],
        "status": [OK] * PER_SHARD,
        "offset": places * 400_000,
        "length": np.full(PER_SHARD, 400_000),
        "crc32": (places + shard).astype(np.uint32),
        "n_coarse": np.full(PER_SHARD, 47, np.int32),
        "n_samples": np.full(PER_SHARD, 47 * 4096, np.int32),
    }
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(PER_SHARD, field.type)
        for field in INDEX_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)


def measure(folder: str) -> dict[str, float]:
    began = time.perf_counter()
    index = load(locate(folder), "train")
    loaded = time.perf_counter()
    order = Order(index.counts, 0, 16)
    stream = Stream((order,), (1,), (Stage(0, 47, BATCH),), 0)
    first = stream.steps(1)
    for step in range(first, first + 200):
        for place in stream.batch(step):
            {name: index.table[name][place.sample].as_py() for name in ("shard", "key", "offset", "length", "crc32")}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "load_seconds": loaded - began,
        "ms_per_batch": (time.perf_counter() - loaded) / 200 * 1000,
        "private_mib": int(status["RssAnon"].split()[0]) / 1024,  # without the index, which is mapped from a file
        "peak_mib": peak_mib(),
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in SIZES:
            folder = Path(temporary) / str(size)
            make_index(folder, size)
            command = [sys.executable, "-m", "benchmarks.index_memory", str(folder)]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            index_mib = (folder / INDEX_NAME).stat().st_size / 2**20
            rows.append({"segments": size, "index_mib": index_mib, **json.loads(found)})
    report("index_memory", rows, per_shard=PER_SHARD, batch=BATCH)


if __name__ == "__main__":
    main()
