"""A recording that is replaced while a stage reads it: codes of the one never meet targets of the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipeline import codes
from pipeline.codes import shard_codes
from pipeline.targets import shard_targets
from pipeline.teachers import Teacher
from shards.contract import FAILED
from shards.index import load
from shards.reader import decode_sample, read_sample
from tests.command_helpers import rows_of
from tests.helpers import codes_settings, speechlike, targets_settings

CHANGED = "the file changed while it was read"
STRETCHES = 6
Samples = dict[str, dict[str, Any]]  # recording, of one segment → codes and target


def manifest(folder: Path, name: str) -> Path:
    """Stretches of a second of the one file, and a recording of another speaker."""
    rows = [{"path": name, "start": i, "end": i + 1, "speaker": "a", "split": "train"} for i in range(STRETCHES)]
    rows.append({"path": "b.wav", "speaker": "b", "split": "validation"})
    soundfile.write(folder / "b.wav", speechlike(1, 24_000, 9), 24_000)
    (folder / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "list.jsonl"


def made(audio: Path, work: Path) -> Samples:
    """What comes of the stretches in both stages."""
    shard_codes(codes_settings(audio, work, "segment_length=1.0", "max_failed_fraction=0.99"))
    shard_targets(targets_settings(work, "max_failed_fraction=0.99"))
    index = load(work / "shards", "train")
    samples = [decode_sample(read_sample(index, sample)) for sample in range(len(index))]
    return {sample["meta"]["recording"]: sample for sample in samples}


def replacing_at(call: int, new: Path, old: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, before whose `call`-th call about the file `old` the file `new` takes its name."""
    calls = count(1)

    def spy(*given: Any) -> Any:
        if any(getattr(about, "path", about) == old for about in given) and next(calls) == call:
            Path(shutil.copy(new, new.with_suffix(".copy"))).rename(old)
        return function(*given)

    return spy


@pytest.mark.parametrize("stage", ["codes", "targets"])
@pytest.mark.parametrize("extension", ["wav", "ogg"])
def test_replaced_while_it_is_read(extension: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file with the same header. What was read of one is kept. Of an Ogg one decoder serves all stretches."""
    folder, new = tmp_path / "audio", tmp_path / "new"
    folder.mkdir()
    old = folder / f"a.{extension}"
    soundfile.write(old, speechlike(STRETCHES, 24_000, 0), 24_000)
    soundfile.write(new, speechlike(STRETCHES, 24_000, 1), 24_000, format=extension)
    audio = manifest(folder, old.name)
    expected = [made(audio, tmp_path / "of_old")]
    kept = shutil.copy(old, tmp_path / "kept")
    shutil.copy(new, old)
    expected.append(made(audio, tmp_path / "of_new"))
    shutil.copy(kept, old)

    where, name = (codes, "content_crc32") if stage == "codes" else (Teacher, "survey")
    monkeypatch.setattr(where, name, replacing_at(3, new, old, getattr(where, name)))
    found = made(audio, tmp_path / "work")
    for id, sample in found.items():
        assert any(all(np.array_equal(sample[name], one[id][name]) for name in ("codes", "target")) for one in expected)
    rows = chain.from_iterable(rows_of(tmp_path / "work" / ("codes" if stage == "codes" else "shards")).values())
    assert CHANGED in {row["reason"] for row in rows if row["status"] == FAILED}
