"""What do 10,000 and 100,000 hours need? GPU hours, bytes, files and cost, from measured bytes and assumed rates.

After benchmarks.planning. Runs both stages over some minutes of real speech and counts bytes per hour (with a stand-in
SNAC, whose weights no size depends on, and `teacher=recording`); then derives the table of docs/scale.md. What was not
measured here is a constant below, and is called assumed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness import RESULTS, of_speech, recordings_in, report
from shards.contract import OK, TARGET_RATE

SPEECH_BYTES = 2_500_000  # some minutes
HOURS = (4_000, 10_000, 100_000)
GPUS = (1, 8, 64)
SEGMENT_SECONDS = 47 * 4096 / TARGET_RATE  # 4 s on whole coarse tokens
SEGMENTS_PER_SHARD = 1000
FILES_PER_SHARD = 3  # codes, tar, sidecar
# Into remote storage: put, and its size, for each and for the sidecar ahead, which is read and deleted; and whether
# codes and sidecar stand.
REQUESTS_PER_SHARD = 2 * (FILES_PER_SHARD + 1) + 2 + 2
ASSUMED = {
    "SIDON, times real time on one GPU, plain": 200,
    "SIDON, times real time on one GPU, batched": 2000,
    "SNAC encoder, times real time on one GPU": 2000,
    "dollars per GPU hour": 3.0,
    "dollars per TB and month": 23.0,
}
PATTERNS = {"codes": "codes/*/*.parquet", "tars": "shards/*/*.tar", "sidecars": "shards/*/*.parquet"}


def bytes_per_hour(speech: Path, work: Path) -> dict[str, float]:
    files = recordings_in(speech)[::7]
    listed = list[str]()
    while files and sum(path.stat().st_size for path in files[: len(listed)]) < SPEECH_BYTES:
        listed.append(f"{files[len(listed)].resolve()},speaker {len(listed) % 2}")
    (work / "list.csv").write_text("\n".join(["path,speaker", *listed]) + "\n")
    where = [f"work={work}", "gpu=cpu"]
    codec = ["pretrained_model=demo/snac_tiny_24khz", "min_seconds=0.5", "validation_fraction=0.5"]
    run("shard-codes", f"audio={work / 'list.csv'}", *where, *codec)
    run("shard-targets", "teacher=recording", "max_failed_fraction=1", *where)
    index = pq.read_table(work / "shards" / "index.parquet")
    hours = pc.sum(index.filter(pc.field("status") == OK)["n_samples"]).as_py() / TARGET_RATE / 3600
    sizes = {name: sum(path.stat().st_size for path in work.glob(pattern)) for name, pattern in PATTERNS.items()}
    return {"hours": hours, **{name: size / hours for name, size in sizes.items()}}


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)


def needs(hours: int, measured: dict[str, float], plan_bytes_per_segment: float) -> dict[str, Any]:
    segments = hours * 3600 / SEGMENT_SECONDS
    terabytes = hours * measured["tars"] / 1e12
    tables = hours * 2 * measured["sidecars"] + segments * plan_bytes_per_segment  # the index holds all sidecars again
    files = round(segments / SEGMENTS_PER_SHARD * FILES_PER_SHARD)
    row: dict[str, Any] = {
        "hours": hours,
        "million_segments": segments / 1e6,
        "files": files,
        "requests": round(segments / SEGMENTS_PER_SHARD * REQUESTS_PER_SHARD),
        "tars_tb": terabytes,
        "codes_gb": hours * measured["codes"] / 1e9,
        "tables_gb": tables / 1e9,
        "dollars_a_month": terabytes * ASSUMED["dollars per TB and month"],
    }
    for way, suffix in (("plain", "_plain"), ("batched", "")):
        rate = ASSUMED[f"SIDON, times real time on one GPU, {way}"]
        gpu_hours = hours / rate + hours / ASSUMED["SNAC encoder, times real time on one GPU"]
        row[f"gpu_hours{suffix}"] = gpu_hours
        row[f"dollars{suffix}"] = gpu_hours * ASSUMED["dollars per GPU hour"]
    return row | {f"days_on_{gpus}": row["gpu_hours"] / 24 / gpus for gpus in GPUS}


@click.command(help=__doc__)
@of_speech
def main(speech: Path) -> None:
    planning = json.loads((RESULTS / "planning.json").read_text())["rows"][-1]
    with tempfile.TemporaryDirectory() as work:
        measured = bytes_per_hour(speech, Path(work))
    plan_bytes = planning["plan_mib"] * 2**20 / planning["segments"]
    rows = [needs(hours, measured, plan_bytes) for hours in HOURS]
    report("corpus", rows, measured_bytes_per_hour=measured, plan_bytes_per_segment=plan_bytes, assumed=ASSUMED)


if __name__ == "__main__":
    main()
