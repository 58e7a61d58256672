"""Which recipe gives the best 48 kHz voice? Stand-in SNAC, real speech, `teacher=recording`, voices held out.

SPEECH/{letters,toys,channels}/LANGUAGE/… holds recordings; folders that the stand-in never heard are judged.

Recipes take turns of a few minutes, each at its own checkpoint, so the table means something after half an hour and
more after hours: the same command goes on until every recipe has `steps`. It ends when `minutes` are over, and may be
killed at any moment. The codec is small and rough and so are the discriminators: figures compare recipes, and say
nothing of snac_24khz. Adversarial training begins from the running mean of `mel` at ADVERSARIAL_FROM.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq

from benchmarks.harness import of_speech, recordings_in, report
from shards.files import replacing
from trainer import checkpoint

SNAC = "demo/snac_tiny_24khz"
HELD_OUT = {"en_GB", "he", "hu", "sl", "el"}  # folders that neither the stand-in nor a decoder hears in training
TURN_STEPS = 100
ADVERSARIAL_FROM = 200  # steps of `mel`
METRICS = "lsd,lsd_reached,mel,si_sdr,level,high_band,visqol"
BASELINE = "mel"  # from which the others' differences are taken, clip by clip
CLIPS = 96
MINUTES = click.FloatRange(min=0, min_open=True)
COMMON = {
    "pretrained_model": SNAC, "gpu": "cpu", "resume": "auto", "batch_size": 6, "segment_length": 0.51,
    "learning_rate": 3e-4, "final_rate": 1.0, "warmup_steps": 20, "ema_decay": 0.99, "phase1_steps": 0,
    "eval_samples": 24, "eval_batch_size": 4, "eval_every": 1000, "eval_clips": 0, "keep_last": 100_000,
    "checkpoint_every": TURN_STEPS, "num_workers": 1, "log_every": 10, "seed": 0,
}  # fmt: skip
MEL = {"l1_weight": 0.0, "stft_weight": 0.0, "mel_weight": 15.0}
SMALL_DISCRIMINATORS = {  # of the stand-in's size: 0.5 M parameters, where the config's have 42 M
    "adversarial_weight": 1.0, "feature_weight": 2.0, "discriminator_start": 50, "mpd_channels": 4, "mrd_channels": 6,
    "discriminator_learning_rate": 3e-4,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "base_log": {"log_stft_weight": 0.1},
    "magnitudes": {"l1_weight": 0.0, "log_stft_weight": 0.1},
    "mel": MEL,
    "adversarial": {**MEL, **SMALL_DISCRIMINATORS},
    "adversarial_balanced": {**MEL, **SMALL_DISCRIMINATORS, "balance_losses": True},
}


def write_manifest(speech: Path, manifest: Path) -> None:
    with replacing(manifest) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "id", "speaker", "split"])
        for path in recordings_in(speech):
            parts = path.relative_to(speech).parts
            if len(parts) < 3:
                raise click.ClickException(f"{path} is not in {speech}/PART/LANGUAGE: its language is not known")
            language = parts[1]
            split = "validation" if language in HELD_OUT else "train"
            writer.writerow([path.resolve(), path.relative_to(speech).as_posix(), language, split])


def command(*words: object) -> None:
    """A command of the front door, which says itself why it fails."""
    if code := subprocess.run([sys.executable, "-m", *map(str, words)], check=False).returncode:
        sys.exit(code)


def prepare(speech: Path, out: Path) -> Path:
    """Shards of the recordings; of the split those that clip are left out, with their reasons."""
    manifest, work = out / "manifest.csv", out / "work"
    out.mkdir(parents=True, exist_ok=True)
    if not manifest.exists():
        write_manifest(speech, manifest)
    command(
        "pipeline", "shard-codes", f"audio={manifest}", f"work={work}", f"pretrained_model={SNAC}", "gpu=cpu",
        "min_seconds=0.4", "segments_per_shard=128",
    )  # fmt: skip
    command("pipeline", "shard-targets", f"work={work}", "teacher=recording", "gpu=cpu", "max_failed_fraction=0.2")
    return work / "shards"


def turn(name: str, out: Path, shards: Path, steps: int) -> bool:
    """Trains one recipe for TURN_STEPS. False when it may not yet begin, or has come to its end."""
    run, begun = out / name, checkpoint.newest_step(out / name)
    settings = {**COMMON, **RECIPES[name]}
    if name.startswith("adversarial"):
        start = checkpoint.step_path(out / "mel", ADVERSARIAL_FROM)
        if not start.exists():
            return False
        settings["init_from"] = start
    if begun >= steps:
        return False
    goal = min(begun + TURN_STEPS, steps)
    words = [
        f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in settings.items()
    ]
    command("trainer", "train", f"shards={shards}", f"run={run}", f"max_steps={goal}", *words)
    for path in sorted(checkpoint.folder(run).glob("step_*.pt"))[:-1]:
        if name != "mel" or path != checkpoint.step_path(run, ADVERSARIAL_FROM):
            checkpoint.remove(path)
    return True


def judge(out: Path, shards: Path) -> None:
    """The running mean of each recipe's newest weights, on whole unseen clips; prints and writes the table."""
    trained = {name: checkpoint.newest(out / name) for name in RECIPES}
    models = {name: path for name, path in trained.items() if path}
    shutil.rmtree(out / "eval", ignore_errors=True)
    command(
        "trainer", "eval", *(f"models.{name}={path}" for name, path in models.items()), f"shards={shards}",
        f"out={out / 'eval'}", f"samples={CLIPS}", f"metrics={METRICS}", "keep_audio=4",
        f"baseline={BASELINE if BASELINE in models else 'warm_start'}",
    )  # fmt: skip
    rows = pq.read_table(out / "eval" / "summary.parquet").to_pylist()
    steps = {name: checkpoint.newest_step(out / name) for name in models}
    settings = {name: {**COMMON, **RECIPES[name]} for name in models}
    table = [{"steps": steps.get(row["system"]), **row} for row in by_system(rows)]
    report("quality", table, steps=steps, settings=settings, clips=CLIPS, differences=by_system(rows, "difference"))


def by_system(rows: list[dict[str, Any]], of: str = "mean") -> list[dict[str, Any]]:
    """Of a summary: a row for each system, with `mean [low, high]` of each metric; `mean` where voices are too few.

    `of="difference"`: from the baseline, clip by clip.
    """
    low, high = ("low", "high") if of == "mean" else (f"{of}_low", f"{of}_high")
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        system = table.setdefault(row["system"], {"system": row["system"]})
        if row[of] is not None:
            digits = 1 if row["metric"].endswith("db") else 2
            system[row["metric"]] = f"{row[of]:.{digits}f}"
            if row[low] is not None:
                system[row["metric"]] += f" [{row[low]:.{digits}f}, {row[high]:.{digits}f}]"
    return list(table.values())


@click.command(help=__doc__)
@of_speech
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--minutes", type=MINUTES, default=30.0, show_default=True, help="It ends then; run it again to go on.")
@click.option("--steps", type=click.IntRange(min=1), default=20_000, show_default=True, help="Of every recipe.")
@click.option("--recipe", "names", type=click.Choice(list(RECIPES)), multiple=True, default=list(RECIPES))
def main(speech: Path, out: Path, minutes: float, steps: int, names: list[str]) -> None:
    until = time.monotonic() + 60 * minutes
    shards = prepare(speech, out)
    moving = True
    while moving and time.monotonic() < until:
        moving = False
        for name in names:
            if time.monotonic() < until:
                moving = turn(name, out, shards, steps) or moving
    judge(out, shards)


if __name__ == "__main__":
    main()
