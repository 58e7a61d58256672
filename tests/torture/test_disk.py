"""A disk that is full, or turns read-only, at any write: one line of error, nothing half written, nothing lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_helpers import in_process, refused
from tests.conftest import Tally
from tests.helpers import codes_words, targets_words
from tests.training_helpers import as_logged, assert_same_state, call, last_state, train_words

FEW = "segments_per_shard=16"


class Disk:
    """Fails at flush number `fails_at` and at every later one, as a disk does that is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushes, self.fails_at, self.error = 0, 0, errno.ENOSPC
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.flush)

    def flush(self, descriptor: int) -> None:
        self.flushes += 1
        if self.fails_at and self.flushes >= self.fails_at:
            raise OSError(self.error, os.strerror(self.error))
        self._fsync(descriptor)

    def counted(self, action: Callable[[], object]) -> int:
        """Flushes of `action` on a disk that has room."""
        self.flushes, self.fails_at = 0, 0
        action()
        return self.flushes

    def fail(self, at: int, error: int) -> None:
        self.flushes, self.fails_at, self.error = 0, at, error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def contents(work: Path) -> dict[str, bytes]:
    files = (path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(work)): path.read_bytes().replace(str(work).encode(), b"WORK") for path in files}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_both_stages_at_every_write(
    error: int, disk: Disk, recordings: Path, tmp_path: Path, times: int, tally: Tally
) -> None:
    """At some, drawn by which error it is, unless torture is repeated."""

    def words(name: str) -> list[list[str]]:
        return [codes_words(recordings, tmp_path / name, FEW), targets_words(tmp_path / name)]

    for command, stage in enumerate(("codes", "shards")):
        whole = words(f"whole {stage}")
        for before in whole[:command]:
            assert in_process(before).exit_code == 0
        writes = disk.counted(lambda again=whole[command]: in_process(again))  # type: ignore[misc]
        assert writes >= 6
        expected = contents(tmp_path / f"whole {stage}")
        first, step = (1, 1) if times > 1 else (error % 6 + 1, 6)
        for at in range(first, writes + 1, step):
            name = f"{stage} {at}"
            disk.fail(0, error)
            for before in words(name)[:command]:
                assert in_process(before).exit_code == 0
            disk.fail(at, error)
            refused(words(name)[command], os.strerror(error))
            assert not list((tmp_path / name).rglob("*.tmp"))
            disk.fail(0, error)
            assert in_process(words(name)[command]).exit_code == 0
            assert contents(tmp_path / name) == expected
            tally[f"disk: {os.strerror(error)}", stage] += 1


def test_training_at_every_write(disk: Disk, work: Path, tmp_path: Path, tally: Tally) -> None:
    whole = train_words(work, tmp_path / "whole", max_steps=3, eval_every=2, checkpoint_every=1)
    writes = disk.counted(lambda: call("train", *whole))
    assert writes >= 6
    for at in range(1, writes + 1, 2):  # each file is flushed, then its folder
        run = tmp_path / str(at)
        words = train_words(work, run, max_steps=3, eval_every=2, checkpoint_every=1)
        disk.fail(at, errno.ENOSPC)
        code, output = call("train", *words)
        assert code == 1
        assert [line[:31] for line in output.splitlines() if line.startswith("error: ")] == [
            "error: No space left on device:"
        ]
        assert "Traceback" not in output
        disk.fail(0, errno.ENOSPC)
        assert call("train", *words)[0] == 0
        assert_same_state(last_state(run), last_state(tmp_path / "whole"))
        assert as_logged(run) == as_logged(tmp_path / "whole")
        tally["disk: No space left on device", "training"] += 1
