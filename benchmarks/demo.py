"""What does `just demo` achieve? Its decoder on its voice's unseen recordings. The codec is the stand-in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import pyarrow.parquet as pq

from benchmarks.harness import report
from benchmarks.quality import by_system, command

METRICS = "lsd,level,high_band,visqol,stoi,dnsmos"


@click.command(help=__doc__)
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, voice = Path(folder) / "eval", Path(folder) / "demo" / "voice"
        command("demo", "demo", f"out={voice.parent}")
        command("trainer", "eval", f"models={voice / 'run'}", f"shards={voice / 'work' / 'shards'}", f"out={out}",
                f"metrics={METRICS}", "gpu=cpu")  # fmt: skip
        summary = pq.read_table(out / "summary.parquet").to_pylist()
    report("demo", by_system(summary), clips=max(row["clips"] for row in summary))


if __name__ == "__main__":
    main()
