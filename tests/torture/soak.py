"""Hours of training, killed again and again, beside the same training left alone: `just soak STEPS OUT`.

Both must end with the same bits. Of the one left alone, memory and open files are watched: they must stay flat.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil
from tqdm import tqdm

from benchmarks.harness import make_new, report
from demo.run import CODES, SNAC, TARGETS, TRAIN
from demo.voice import write_voices
from tests.training_helpers import assert_same_state, last_state
from trainer import checkpoint

KILL_AFTER = (20, 120)  # seconds
WATCH_EVERY = 5.0  # seconds
QUARTERS = 4


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def make_shards(out: Path) -> Path:
    write_voices(out / "recordings")
    codes = [f"{name}={value}" for name, value in CODES.items()]
    targets = [f"{name}={value}" for name, value in TARGETS.items()]
    work = f"work={out / 'work'}"
    common = [f"audio={out / 'recordings'}", f"pretrained_model={SNAC}", work, "gpu=cpu"]
    subprocess.run(command("pipeline", "shard-codes", *common, *codes), check=True)
    subprocess.run(command("pipeline", "shard-targets", work, "gpu=cpu", *targets), check=True)
    return out / "work" / "shards"


def start(shards: Path, run: Path, steps: int) -> psutil.Popen:
    settings = {**TRAIN, "shards": shards, "run": run, "pretrained_model": SNAC, "gpu": "cpu", "max_steps": steps}
    words = [f"{name}={value}" for name, value in settings.items()]
    return psutil.Popen(command("trainer", "train", *words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def observed(process: psutil.Popen) -> dict[str, float]:
    """Of the process and those that read for it."""
    family = [process, *process.children(recursive=True)]
    return {
        "private_mib": sum(member.memory_full_info().uss for member in family) / 2**20,
        "open_files": sum(member.num_fds() for member in family),
    }


def soak(shards: Path, out: Path, steps: int) -> tuple[list[dict[str, float]], int]:
    """What was observed of the run left alone, and how often the other was killed."""
    chance, kills, observations = random.Random(0), 0, list[dict[str, float]]()
    alone, killed = start(shards, out / "alone", steps), start(shards, out / "killed", steps)
    began = time.monotonic()
    kill_at = began + chance.uniform(*KILL_AFTER)
    progress = tqdm(total=2 * steps, desc="both trainings", unit=" step")
    while alone.poll() is None or killed.poll() is None:
        time.sleep(WATCH_EVERY)
        progress.update(sum(checkpoint.newest_step(out / name) for name in ("alone", "killed")) - progress.n)
        progress.set_postfix(kills=kills)
        if alone.is_running() and alone.poll() is None:
            observations.append({"seconds": time.monotonic() - began, **observed(alone)})
        if killed.poll() is None and time.monotonic() > kill_at:
            killed.kill()
            killed.wait()
            kills += 1
            killed, kill_at = start(shards, out / "killed", steps), time.monotonic() + chance.uniform(*KILL_AFTER)
    progress.close()
    if (alone.returncode, killed.returncode) != (0, 0):
        sys.exit(f"error: a training failed; see {out}")
    return observations, kills


def quarters(observations: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Medians, first without what a start takes."""
    size = len(observations) // QUARTERS
    for number in range(QUARTERS):
        part = observations[number * size :][:size]
        yield {
            "until_minute": part[-1]["seconds"] / 60,
            **{name: statistics.median(found[name] for found in part) for name in ("private_mib", "open_files")},
        }


@click.command(help=__doc__)
@click.argument("steps", type=click.IntRange(min=1))
@click.argument("out", type=click.Path(path_type=Path))
def main(steps: int, out: Path) -> None:
    make_new(out)
    os.environ["OMP_NUM_THREADS"] = "1"
    observations, kills = soak(make_shards(out), out, steps)
    (out / "observed.json").write_text(json.dumps(observations) + "\n")
    assert_same_state(last_state(out / "killed"), last_state(out / "alone"))
    report("soak", list(quarters(observations)), steps=steps, kills=kills, same_bits=True)


if __name__ == "__main__":
    main()
