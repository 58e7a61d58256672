"""A disk or server that fails ends the run: it is never taken for recordings that are broken."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from codec.audio import AudioError, Recording, probe
from pipeline.codes import CodesStage, shard_codes
from pipeline.plan import make_plan
from pipeline.targets import TargetsStage
from pipeline.tars import members
from shards.errors import UserError
from shards.pieces import Part, Stored
from shards.writer import ShardWriter
from tests.command_helpers import in_process, refused
from tests.helpers import codes_settings, codes_words, speechlike, targets_settings, targets_words
from tests.test_audio import write


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}


def test_recordings_whose_disk_goes_away_are_not_broken(recordings: Path, tmp_path: Path) -> None:
    audio, work, away = tmp_path / "audio", tmp_path / "work", tmp_path / "away"
    shutil.copytree(recordings, audio)
    assert in_process(codes_words(audio, work, "segments_per_shard=4")).exit_code == 0
    codes = tables(work / "codes")
    first = min((work / "codes" / "train").iterdir())
    first.unlink()
    audio.rename(away)
    refused(codes_words(audio, work, "segments_per_shard=4"), f"{audio} is not there: is it mounted?")
    assert not first.exists()
    audio.mkdir()  # as a disk that is not mounted looks
    refused(codes_words(audio, work, "segments_per_shard=4"), "holds no recordings")
    refused(targets_words(work), f"{first} is missing")
    audio.rmdir()
    away.rename(audio)
    assert in_process(codes_words(audio, work, "segments_per_shard=4")).exit_code == 0
    assert tables(work / "codes") == codes
    audio.rename(away)
    refused(targets_words(work), f"{audio} is not there: is it mounted?")
    audio.mkdir()
    refused(targets_words(work), f"{audio} is empty: is it mounted?")
    assert not list((work / "shards").rglob("*.tar"))


def test_nothing_is_written_where_the_disk_of_the_shards_was(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away after the first shard, its mount point stays; the same command goes on once it is back."""
    work, away = tmp_path / "work", tmp_path / "away"
    settings = codes_settings(recordings, work, "segments_per_shard=4")
    make, calls = CodesStage.make, count()

    def make_or_go(*given: Any) -> None:
        if next(calls) == 1:
            work.rename(away)
            work.mkdir()
        make(*given)

    with monkeypatch.context() as patched:
        patched.setattr(CodesStage, "make", make_or_go)
        with pytest.raises(UserError, match="codes is gone: is it mounted"):
            shard_codes(settings)
    work.rmdir()  # which is empty
    away.rename(work)
    (first,) = (work / "codes").glob("*/*.parquet")
    written = first.stat().st_mtime_ns
    shard_codes(settings)
    assert len(list((work / "codes").glob("*/*.parquet"))) == len(make_plan(settings).shards)
    assert first.stat().st_mtime_ns == written


def test_a_shard_that_cannot_be_written_leaves_no_thread(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended later, by the garbage collector, one could keep another from starting, for good."""
    shutil.copytree(work / "codes", tmp_path / "codes")
    shutil.copy(work / "plan.parquet", tmp_path)
    (tmp_path / "shards").mkdir()
    stage = TargetsStage(targets_settings(tmp_path))

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", fail)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="No space left") as error:
        stage.make(0, lambda seconds: None)
    assert set(threading.enumerate()) <= before  # of which some may end meanwhile
    assert error.tb is not None, "which holds on to the frames that it came through"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_errors_of_the_system_are_no_reasons(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a.wav"
    path.write_bytes(b"which libsndfile cannot read")
    reads: list[Callable[[], object]] = [partial(probe, path)]
    if call == "open":
        reads.append(lambda: list(members(path, [".wav"])))
    monkeypatch.setattr(Path, call, fail)
    for read in reads:
        with pytest.raises(UserError, match=f"{os.strerror(number)}: its disk or server fails"):
            read()


class Failing(io.FileIO):
    """A file whose disk fails once, `after` so many bytes; then it reads on."""

    def __init__(self, path: Path, after: int) -> None:
        super().__init__(path)
        self._left = [after]

    def readinto(self, buffer: Any) -> int:
        if self._left and self.tell() >= self._left[0]:
            self._left.clear()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super().readinto(buffer) or 0


class Interrupted(io.FileIO):
    """A file amid which Ctrl-C is pressed, once."""

    _is_pressed = False

    def readinto(self, buffer: Any) -> int:
        if self.tell() > 20_000 and not self._is_pressed:
            self._is_pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().readinto(buffer) or 0


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("in_a_tar", [False, True])
def test_a_disk_that_fails_while_a_recording_is_read_is_no_reason(
    in_a_tar: bool, extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails: in the header, or in any later part."""
    file = write(tmp_path / f"a.{extension}", speechlike(20, 24_000, 0), 24_000, None)
    path: Stored = Part(file, 0, file.stat().st_size) if in_a_tar else file
    header = probe(path)
    for share in (0, 0.3, 0.7):
        after = int(share * file.stat().st_size)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", lambda self, mode, after=after: io.BufferedReader(Failing(self, after)))
            with pytest.raises(UserError, match="Stale file handle: its disk or server fails"):
                list(Recording(path, header).blocks())


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_ctrl_c_while_a_recording_is_read_is_no_reason(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libsndfile lets no error through, and soundfile would print it and go on."""
    path = write(tmp_path / f"a.{extension}", speechlike(20, 24_000, 0), 24_000, None)
    header = probe(path)
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Interrupted(self)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have its background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(Recording(path, header).blocks())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", speechlike(0.5, 24_000, 0), 24_000)
    path.chmod(0)
    with pytest.raises(AudioError, match="not readable as audio: Permission denied"):
        probe(path)
