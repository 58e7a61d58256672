"""A clock that runs backwards, and files from the future: nothing is made again, nothing is skipped, no bit differs."""

from __future__ import annotations

import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest

from tests.command_helpers import in_process, stamps
from tests.helpers import codes_words, targets_words
from tests.torture.test_disk import contents
from tests.training_helpers import assert_same_state, call, last_state, train_words

FUTURE = 4_000_000_000.0  # seconds since 1970: in 2096
FEW = "segments_per_shard=16"


def test_the_clock_decides_nothing(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, work = tmp_path / "undisturbed", tmp_path / "work"
    for command in (codes_words(recordings, undisturbed, FEW), targets_words(undisturbed)):
        assert in_process(command).exit_code == 0
    whole = train_words(undisturbed, tmp_path / "whole", max_steps=4, checkpoint_every=1, eval_every=2)
    assert call("train", *whole)[0] == 0

    audio = Path(shutil.copytree(recordings, tmp_path / "audio"))
    backwards = count()
    monkeypatch.setattr(time, "time", lambda: FUTURE - 3600 * next(backwards))
    assert in_process(codes_words(audio, work, FEW)).exit_code == 0
    for path in [*audio.rglob("*.wav"), *work.rglob("*.parquet")]:
        os.utime(path, (FUTURE, FUTURE))
    assert in_process(targets_words(work)).exit_code == 0
    made = stamps(work / "shards")
    for again in (codes_words(audio, work, FEW), targets_words(work)):
        assert in_process(again).exit_code == 0
    assert stamps(work / "shards").items() >= {name: made[name] for name in made if name.endswith(".tar")}.items()
    found, expected = (
        {name: data for name, data in contents(folder).items() if name.endswith((".tar", ".parquet"))}
        for folder in (work / "shards", undisturbed / "shards")
    )
    assert found == expected

    run = tmp_path / "run"
    for steps in (2, 4):
        words = train_words(undisturbed, run, max_steps=steps, checkpoint_every=1, eval_every=2)
        assert call("train", *words)[0] == 0
        for path in run.rglob("*"):
            os.utime(path, (FUTURE, FUTURE))
    assert_same_state(last_state(run), last_state(tmp_path / "whole"))
    assert "last logged" in call("status", f"run={run}")[1]
