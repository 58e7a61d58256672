"""Does the base recipe learn on real speech? Stand-in SNAC, `teacher=recording`, voices held out, one CPU.

Usage: python -m benchmarks.learning SPEECH OUT, where SPEECH/{letters,toys,channels}/LANGUAGE/… holds recordings.
Languages that the stand-in codec never heard are the validation split. OUT keeps shards and run; rerunning resumes.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from codec.audio import EXTENSIONS

HELD_OUT = {"en_GB", "he", "hu", "sl", "el"}
SNAC = "demo/snac_tiny_24khz"
RESULTS = Path(__file__).parent / "results"
TRAINING = {
    "gpu": "cpu",
    "batch_size": 6,
    "segment_length": 0.5,
    "learning_rate": 3e-4,
    "max_steps": 300,
    "phase1_steps": 150,
    "rate_schedule": "constant",
    "warmup_steps": 0,
    "ema_decay": 0.0,
    "best_metric": "loss",
    "eval_every": 100,
    "eval_samples": 96,
    "checkpoint_every": 100,
    "num_workers": 1,
    "seed": 0,
}


def write_manifest(speech: Path, manifest: Path) -> None:
    files = sorted(path for path in speech.rglob("*") if path.suffix.lower() in EXTENSIONS)
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "id", "speaker", "split"])
        for path in files:
            language = path.relative_to(speech).parts[1]
            split = "validation" if language in HELD_OUT else "train"
            writer.writerow([path.resolve(), path.relative_to(speech).as_posix(), language, split])


def command(*words: object) -> str:
    """Runs a command of the front door; its output is shown as it comes and returned."""
    shown = [sys.executable, "-m", *map(str, words)]
    process = subprocess.run(shown, stdout=subprocess.PIPE, text=True, check=True)
    print(process.stdout, end="")
    return process.stdout


def draw(metrics: Path, picture: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    curve = [row for row in rows if row["kind"] == "validation"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, names in zip(axes, (("loss",), ("lsd", "lsd_hf", "lsd_lf")), strict=True):
        for name in names:
            axis.plot([row["step"] for row in curve], [row[name] for row in curve], label=name, marker=".")
        axis.set_xlabel("step")
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_title("validation loss, unseen voices (stand-in SNAC)", fontsize=9)
    axes[1].set_title("log-spectral distance", fontsize=9)
    figure.savefig(picture, dpi=110)
    return curve


def main() -> None:
    speech, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.csv"
    if not manifest.exists():
        write_manifest(speech, manifest)
    run, shards = out / "run", out / "work" / "shards"
    command(
        "pipeline", "shard-codes", f"audio={manifest}", f"work={out / 'work'}", f"pretrained_model={SNAC}", "gpu=cpu",
        "min_seconds=0.4", "segments_per_shard=128",
    )  # fmt: skip
    command("pipeline", "shard-targets", f"work={out / 'work'}", "teacher=recording", "gpu=cpu")
    settings = [f"{key}={value}" for key, value in TRAINING.items()]
    command("trainer", "train", f"shards={shards}", f"run={run}", f"pretrained_model={SNAC}", "resume=auto", *settings)
    shutil.rmtree(out / "eval", ignore_errors=True)
    table = command(
        "trainer", "eval", f"models.trained={run}", f"shards={shards}", f"out={out / 'eval'}", "samples=96",
        "metrics=lsd,lsd_reached,stft,mel,level,bandwidth,high_band",
    )  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    curve = draw(run / "metrics.jsonl", RESULTS / "learning.png")
    result = {"settings": TRAINING, "validation": curve, "table": table.splitlines()}
    (RESULTS / "learning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
