"""What `just demo` does, through the same commands that people call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pyarrow.compute as pc
import pyarrow.parquet as pq

from demo.picture import draw
from demo.settings import DemoSettings
from demo.voice import write_voices
from pipeline.workflow import run_module
from shards.contract import OK
from shards.stretch import read_at

SNAC = Path(__file__).parent / "snac_tiny_24khz"
CODES = {"min_seconds": 0.3, "segment_length": 2.0, "segments_per_shard": 32, "validation_fraction": 0.2}
TARGETS = {"teacher": "recording"}
TRAIN = {
    "resume": "auto",
    "batch_size": 4,
    "segment_length": 0.5,
    "learning_rate": 3e-4,
    "phase1_steps": 40,
    "l1_weight": 0.0,  # the stand-in's waveforms have little in common with the voice's: docs/training.md
    "stft_weight": 0.0,
    "mel_weight": 15.0,
    "log_stft_weight": 2.0,  # mel filters give no weight to 0 Hz and 24 kHz, where tones would stay
    "warmup_steps": 10,
    "ema_decay": 0.95,
    "eval_every": 80,
    "eval_samples": 24,
    "checkpoint_every": 40,
    "num_workers": 1,
    "window_shards": 4,
}
SUMMARY = """
Done. Listen and look:
  48 kHz from tokens    {wav}
  picture               {picture}
  stock snac loads      {export}
  shards                {shards}
  training log          {run}/training.log
The models are stand-ins: the codec is demo/snac_tiny_24khz, small and rough, not hubertsiuzdak/snac_24khz, and
targets are the recordings themselves, not SIDON's. What you hear shows that the way works, not how good it gets.
"""


def run(settings: DemoSettings) -> None:
    """Ends with a summary; leaves with the exit code of the first command that fails."""
    out = settings.out / ("voice" if settings.audio is None else f"own-{settings.audio.resolve().name}")
    audio, codes, targets = settings.audio, dict[str, object](CODES), dict[str, object](TARGETS)
    if audio is None:
        audio = out / "recordings"
        click.echo(f"making a voice by code in {audio}")
        write_voices(audio)
    else:
        codes["group_pattern"] = "(.*)"  # few recordings: each is a group of its own, and one may be a large share
        codes["max_failed_fraction"] = targets["max_failed_fraction"] = 1.0
    work, training, export = out / "work", out / "run", out / "snac_48khz"
    _command(
        "pipeline", "workflow", f"audio={audio}", f"work={work}", f"run={training}", f"pretrained_model={SNAC}",
        "gpu=cpu", f"codes={json.dumps(codes)}", f"targets={json.dumps(targets)}",
        f"train={json.dumps({**TRAIN, 'max_steps': settings.max_steps})}",
    )  # fmt: skip
    shutil.rmtree(export, ignore_errors=True)  # of an earlier demo with fewer steps
    _command("trainer", "export", f"model={training}", f"out={export}")
    unseen = _unseen_recording(work / "plan.parquet", out)
    wav = out / f"{unseen.stem}.48k.wav"
    wav.unlink(missing_ok=True)
    _command("trainer", "decode", f"model={export}", f"input={unseen}", f"out={wav}")
    picture = out / "spectrograms.png"
    draw(unseen, wav, SNAC, picture)
    click.echo(SUMMARY.format(wav=wav, picture=picture, export=export, shards=work / "shards", run=training))


def _command(*words: str) -> None:
    click.echo(f"\n$ python -m {' '.join(words[:2])}", err=True)
    run_module(*words)


def _unseen_recording(plan: Path, out: Path) -> Path:
    """The first that trained nothing; one that lies in a tar is copied to `out`."""
    of_use = (pc.field("split") == "validation") & (pc.field("status") == OK)
    row = pq.read_table(plan, columns=["recording", "path", "offset", "file_bytes"], filters=of_use).to_pylist()[0]
    if row["offset"] is None:
        return Path(row["path"])
    copy = out / Path(row["recording"]).name
    with Path(row["path"]).open("rb") as tar:
        copy.write_bytes(read_at(tar, row["offset"], row["file_bytes"]))
    return copy
