"""How long do planning and starting take, and how much memory? 1,000, 100,000 and 1,000,000 recordings of a manifest.

The manifest states lengths, so no recording is opened (there is none).
"Starting" is what a run does before its first shard, with every other shard done: it loads the plan, looks at each
shard and knows what is left. Each step runs in a process of its own, for its peak memory. The floor is pyarrow alone:
the manifest read from Parquet and the plan written once it is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import peak_mib, report
from configs.loader import load_settings
from pipeline.codes import CodesStage
from pipeline.execute import left_to_do
from pipeline.plan import Plan, make_plan
from pipeline.settings import CodesSettings
from shards.contract import CODES_SCHEMA, PLAN_NAME
from shards.writer import write_table

COUNTS = (1_000, 100_000, 1_000_000)
SECONDS = (2.0, 18.0)  # of a recording: 10 s on average, three segments


def write_manifest(count: int, path: Path) -> None:
    random = np.random.default_rng(0)
    rate = random.choice([16_000, 24_000, 44_100, 48_000], count)
    frames = (random.uniform(*SECONDS, count) * rate).astype(np.int64)
    speaker = random.integers(0, max(count // 200, 2), count)
    names = [f"corpus/speaker_{voice:05d}/utterance_{number:07d}.flac" for number, voice in enumerate(speaker)]
    speakers = [f"speaker_{voice:05d}" for voice in speaker]
    columns: dict[str, Any] = {"path": names, "speaker": speakers, "frames": frames, "rate": rate}
    pq.write_table(pa.table(columns), path)


def settings_of(folder: Path) -> CodesSettings:
    given = [f"audio={folder / 'manifest.parquet'}", f"work={folder / 'work'}", "gpu=cpu"]
    return load_settings(CodesSettings, "shard_codes.json", [*given, "pretrained_model=demo/snac_tiny_24khz"])


def plan(folder: Path) -> int:
    return len(make_plan(settings_of(folder)).shards)


def start(folder: Path) -> int:
    stage = CodesStage(settings_of(folder))
    make_plan(stage.settings)
    return len(left_to_do(stage, range(len(stage.plan.shards))))


def floor(folder: Path) -> int:
    pq.read_table(folder / "manifest.parquet")
    table = pq.read_table(folder / "work" / PLAN_NAME)
    pq.write_table(table, folder / "floor.parquet", row_group_size=1000, compression="zstd")
    return int(table.num_rows)


STEPS: dict[str, Callable[[Path], int]] = {"plan": plan, "start": start, "floor": floor}


def pretend_every_second_shard_is_done(folder: Path) -> None:
    """Codes files with the fingerprints that this run gives, and no rows."""
    stage = CodesStage(settings_of(folder))
    for number in range(0, len(stage.plan.shards), 2):
        write_table(stage.table(number), CODES_SCHEMA.empty_table(), {"fingerprint": stage.fingerprint(number)})


def in_a_process(step: str, folder: Path) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.planning", step, str(folder)]
    answer = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    found: dict[str, float] = json.loads(answer)
    return found


def measure(step: str, folder: Path) -> None:
    began = time.perf_counter()
    result = STEPS[step](folder)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib(), "result": result}))


def row(count: int, folder: Path) -> dict[str, float]:
    write_manifest(count, folder / "manifest.parquet")
    planned = in_a_process("plan", folder)
    pretend_every_second_shard_is_done(folder)
    started, least = in_a_process("start", folder), in_a_process("floor", folder)
    return {
        "recordings": count,
        "segments": int(least["result"]),
        "shards": len(Plan(folder / "work" / PLAN_NAME).shards),
        "plan_seconds": planned["seconds"],
        "plan_peak_mib": planned["peak_mib"],
        "start_seconds": started["seconds"],
        "start_peak_mib": started["peak_mib"],
        "floor_seconds": least["seconds"],
        "plan_mib": (folder / "work" / PLAN_NAME).stat().st_size / 2**20,
    }


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    rows = []
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(count, Path(folder)))
    report("planning", rows, settings="configs/shard_codes.json: segments of 4 s, 1000 to a shard")


if __name__ == "__main__":
    main()
