"""Does memory grow with the input? The peak of each stage over an input and over one a hundred times as large.

Usage: python -m benchmarks.memory. Once with a hundred times as many recordings, once with one recording a hundred
times as long; stand-in SNAC, each recording its own target. Each command runs in a process of its own and says in the
end what its largest resident set was.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile

from benchmarks.harness import peak_mib, report
from demo.run import SNAC
from demo.voice import synthesize

RATE = 24_000
SECONDS, MINUTES, TIMES = 2, 1, 100
RECORDINGS = 20
PIECE = np.asarray(synthesize(0, 0, 60.0)[::2], np.float32)  # a minute; that it is not band-limited does not matter


def many(folder: Path, times: int) -> Path:
    """A manifest of so many recordings, which are cut from the same file."""
    soundfile.write(folder / "minute.flac", PIECE, RATE)
    lines = ["path,id,speaker,start,end"]
    for number in range(RECORDINGS * times):
        start = number % (60 // SECONDS) * SECONDS
        lines.append(f"minute.flac,{number:06d},{number % 7},{start},{start + SECONDS}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def long(folder: Path, times: int) -> Path:
    """One recording of so many minutes, and a minute of another speaker for the other split."""
    for name, minutes in (("long", MINUTES * times), ("short", 1)):
        (folder / name).mkdir()
        with soundfile.SoundFile(folder / name / "recording.flac", "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(PIECE)
    return folder


WATCHED = """
import atexit, pathlib, runpy, sys
status, module = pathlib.Path(sys.argv[1]), sys.argv[2]
atexit.register(lambda: status.write_bytes(pathlib.Path("/proc/self/status").read_bytes()))
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__")
"""
INPUTS = {"recordings": many, "length": long}


def commands(audio: Path, work: Path) -> dict[str, list[str]]:
    where = [f"work={work}", "gpu=cpu"]
    codec, shards = f"pretrained_model={SNAC}", f"shards={work / 'shards'}"
    small = ["batch_size=4", "segment_length=0.5", "max_steps=5", "phase1_steps=2", "eval_samples=8"]
    return {
        "shard-codes": ["pipeline", "shard-codes", f"audio={audio}", codec, "validation_fraction=0.3", *where],
        "shard-targets": ["pipeline", "shard-targets", "teacher=recording", *where],
        "verify": ["pipeline", "verify", shards],
        "train": ["trainer", "train", shards, f"run={work / 'run'}", codec, "gpu=cpu", *small],
    }


def peak_of(words: list[str], folder: Path) -> float:
    subprocess.run([sys.executable, "-c", WATCHED, str(folder / "status"), *words], check=True)
    return peak_mib(folder / "status")


@click.command(help=__doc__)
def main() -> None:
    peaks: dict[tuple[str, str], list[float]] = {}
    for grows, make in INPUTS.items():
        for times in (1, TIMES):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "audio").mkdir()
                audio = make(Path(folder) / "audio", times)
                for command, words in commands(audio, Path(folder) / "work").items():
                    peaks.setdefault((command, grows), []).append(peak_of(words, Path(folder)))
    rows: list[dict[str, Any]] = [
        {"command": command, "grows": grows, "peak_mib": small, "peak_mib_100_times": large, "ratio": large / small}
        for (command, grows), (small, large) in peaks.items()
    ]
    report("memory", rows, recordings=RECORDINGS, seconds_each=SECONDS, minutes=MINUTES, times=TIMES)


if __name__ == "__main__":
    main()
