"""All stages on at least ten minutes of real speech, through the commands that people call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from shards.contract import OK, TARGET_RATE
from tests.helpers import TINY_SNAC, run_command

MINIMUM_SECONDS = 600


@pytest.fixture(scope="module")
def speech(real_speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole languages of one package, until they hold ten minutes."""
    chosen, seconds = tmp_path_factory.mktemp("chosen"), 0.0
    for language in sorted((real_speech / "toys").iterdir()):
        if seconds < MINIMUM_SECONDS:
            shutil.copytree(language, chosen / language.name)
            seconds += sum(soundfile.info(str(file)).duration for file in language.rglob("*.*"))
    assert seconds >= MINIMUM_SECONDS
    (chosen / "ca" / "broken.wav").write_text("this is not audio")
    return chosen


def succeed(*words: str) -> str:
    result = run_command(*words)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_recordings_to_voice(speech: Path, tmp_path: Path) -> None:
    work, run = tmp_path / "work", tmp_path / "run"
    snac = f"pretrained_model={TINY_SNAC}"
    folder = "group_pattern=^([^/]+)/"
    small = ["gpu=cpu", "min_seconds=0.5", "segments_per_shard=200", "validation_fraction=0.2", folder]
    succeed("pipeline", "shard-codes", f"audio={speech}", f"work={work}", snac, *small)
    succeed("pipeline", "shard-targets", f"work={work}", "gpu=cpu", "teacher=recording")
    assert "are whole" in succeed("pipeline", "verify", f"shards={work / 'shards'}")

    index = pq.read_table(work / "shards" / "index.parquet").to_pylist()
    files = {file.relative_to(speech).as_posix() for file in speech.rglob("*") if file.is_file()}
    assert {row["recording"] for row in index} == files
    assert all(row["status"] == OK or row["reason"] for row in index)
    assert sum(row["n_samples"] for row in index if row["status"] == OK) / TARGET_RATE >= 0.9 * MINIMUM_SECONDS
    groups = {split: {row["group"] for row in index if row["split"] == split} for split in ("train", "validation")}
    assert groups["train"]
    assert groups["validation"]
    assert not groups["train"] & groups["validation"]

    training = ["gpu=cpu", "batch_size=4", "segment_length=0.5", "phase1_steps=4", "eval_every=6", "eval_samples=8"]
    training += [f"shards={work / 'shards'}", f"run={run}", snac, "num_workers=1", "log_every=1", "checkpoint_every=6"]
    succeed("trainer", "train", *training, "max_steps=6")
    succeed("trainer", "train", *training, "max_steps=12", "resume=auto")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in metrics if row["kind"] == "validation"] == [0, 6, 12]

    recording = next(speech / row["recording"] for row in index if row["split"] == "validation" and row["status"] == OK)
    succeed("trainer", "export", f"model={run}", f"out={tmp_path / 'export'}")
    succeed("trainer", "decode", f"model={tmp_path / 'export'}", f"input={recording}", f"out={tmp_path / 'o.wav'}")
    source, decoded = soundfile.info(str(recording)), soundfile.info(str(tmp_path / "o.wav"))
    assert decoded.samplerate == TARGET_RATE
    assert decoded.frames == -(-source.frames * TARGET_RATE // source.samplerate)
