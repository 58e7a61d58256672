"""One slice of the shards: the slices together make the bytes of one run, whoever is killed or comes first."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from pipeline.codes import shard_codes
from pipeline.execute import left_to_do
from pipeline.plan import Plan
from pipeline.settings import VerifySettings
from pipeline.targets import TargetsStage, shard_targets
from pipeline.verify import verify
from shards.contract import PLAN_NAME
from shards.errors import ShardError
from shards.files import exclusive
from shards.index import forget
from shards.writer import read_table
from tests.command_helpers import in_process, refused
from tests.helpers import codes_settings, codes_words, targets_settings, targets_words
from tests.test_execute import SMALL, in_background, same, whole

__all__ = ["whole"]


def slice_words(index: int, count: int) -> list[str]:
    return ["execute=slice", f"slice_index={index}", f"slice_count={count}"]


def test_slices_make_the_bytes_of_one(
    recordings: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any order, and again; the last one makes the index, and counts what became of all segments."""
    work = tmp_path / "work"
    for index in (2, 0, 1):
        shard_codes(codes_settings(recordings, work, SMALL, *slice_words(index, 3)))
    for index in (1, 2, 2, 0):
        assert not (work / "shards" / "index.parquet").exists()
        shard_targets(targets_settings(work, *slice_words(index, 3)))
    said = capsys.readouterr().out
    assert said.count("slice 2 of 3 is done; ") == 3
    *of_slices, of_all = map(int, re.findall(r"^writing targets: .*: (\d+) segments,", said, re.M))
    assert max(of_slices) < of_all == len(read_table(work / PLAN_NAME))
    same(work, whole)
    shard_targets(targets_settings(work, *slice_words(1, 3)))
    same(work, whole)


def test_another_slices_failures_do_not_keep_the_index_away(recordings: Path, tmp_path: Path) -> None:
    """A recording that stays broken, or away, is its slice's affair, also when others retry what failed of theirs."""
    audio, work = Path(shutil.copytree(recordings, tmp_path / "audio")), tmp_path / "work"
    (audio / "speaker_0" / "broken.wav").write_text("no audio")
    shard_codes(codes_settings(audio, work, SMALL, "max_failed_fraction=1"))
    (audio / "speaker_1" / "take_1.wav").unlink()
    failed = "retry=failed", "max_failed_fraction=1"
    for index in (0, 1):
        shard_targets(targets_settings(work, *slice_words(index, 2), *failed))
    for index in (0, 1):
        (work / "shards" / "index.parquet").unlink()
        shard_targets(targets_settings(work, *slice_words(index, 2), *failed))
        assert (work / "shards" / "index.parquet").exists()


def test_another_slices_shards_of_other_settings_are_refused(whole: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(whole, tmp_path / "work", ignore=shutil.ignore_patterns("shards")))
    shard_targets(targets_settings(work, *slice_words(0, 2)))
    with pytest.raises(ShardError, match=r"000000\.parquet .*target_bits"):
        shard_targets(targets_settings(work, "target_bits=24", *slice_words(1, 2)))
    assert not (work / "shards" / "index.parquet").exists()


def test_slices_touch_their_own_shards_only(recordings: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shard_codes(codes_settings(recordings, work, SMALL, *slice_words(1, 3)))
    shards = Plan(work / PLAN_NAME).shards
    found = {(path.parent.name, int(path.stem)) for path in (work / "codes").glob("*/*.parquet")}
    assert found == set(shards[1::3])
    shard_targets(targets_settings(work, *slice_words(1, 3)))  # the codes of others are not its concern
    assert {(path.parent.name, int(path.stem)) for path in (work / "shards").glob("*/*.tar")} == set(shards[1::3])


def test_slices_at_the_same_time(recordings: Path, whole: Path, tmp_path: Path) -> None:
    """Started together on an empty folder: one plans, the others wait; whoever comes last makes the index."""
    work = tmp_path / "work"
    for words in (codes_words(recordings, work, SMALL), targets_words(work)):
        started = [in_background(*words, *slice_words(index, 2)) for index in range(2)]
        assert [process.wait() for process in started] == [0, 0]
    same(work, whole)


def test_a_killed_slice_goes_on_where_it_stopped(recordings: Path, whole: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(whole, work, ignore=shutil.ignore_patterns("shards", "codes"))
    other = [*codes_words(recordings, work, SMALL), *slice_words(1, 2)]
    killed = in_background(*codes_words(recordings, work, SMALL), *slice_words(0, 2))
    while not list((work / "codes").glob("*/*.parquet")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (work / "codes" / "train" / "000000.parquet.tmp").write_text("left by the killed one")
    assert in_process(other).exit_code == 0
    assert (work / "codes" / "train" / "000000.parquet.tmp").exists()  # it is not this slice's
    assert in_process([*other[:-2], *slice_words(0, 2)[1:]]).exit_code == 0
    shard_targets(targets_settings(work))
    same(work, whole)


def test_a_slice_runs_once_and_not_beside_a_whole_run(recordings: Path, whole: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(whole, tmp_path / "work"))
    words = codes_words(recordings, work, SMALL)
    with exclusive(work, shared=True), exclusive(work, ".lock-1-of-3"):
        refused([*words, *slice_words(1, 3)], "another process is writing here")
        refused(words, "another process is writing here")
        assert in_process([*words, *slice_words(2, 3)]).exit_code == 0
    with exclusive(work):
        refused([*words, *slice_words(2, 3)], "another process is writing here")


def test_a_shard_that_is_made_again_and_the_index_of_another_slice_agree(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other comes to its end when the index has been taken away and the shard does not stand yet."""
    audio, work = Path(shutil.copytree(recordings, tmp_path / "audio")), tmp_path / "work"
    shard_codes(codes_settings(audio, work, SMALL))
    away = (audio / "speaker_1" / "take_1.wav").rename(tmp_path / "take_1.wav")
    shard_targets(targets_settings(work, "max_failed_fraction=1"))
    away.rename(audio / "speaker_1" / "take_1.wav")
    stage = TargetsStage(targets_settings(work, *slice_words(0, 2), "retry=failed").of_one("cpu"))  # as its processes
    again, *_ = left_to_do(stage, range(len(stage.plan.shards)))
    ending = targets_settings(work, *slice_words(1, 2), "max_failed_fraction=1")
    other = threading.Thread(target=shard_targets, args=(ending,))

    def and_meanwhile(folder: Path) -> None:
        forget(folder)
        other.start()
        while other.is_alive() and ": waiting for it" not in capsys.readouterr().out:
            time.sleep(0.05)

    monkeypatch.setattr("pipeline.targets.forget", and_meanwhile)
    stage.make(again, lambda seconds: None)
    other.join()
    verify(VerifySettings(shards=work / "shards", threads=1, set_aside=False))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["execute=slice"], "execute=slice needs slice_count=N and slice_index=I with I from 0 to N − 1"),
        (slice_words(3, 3), "execute=slice needs slice_count=N"),
        (slice_words(0, 2)[1:], "slice_index and slice_count go with execute=slice"),
        (["workers=0"], "workers: "),
        (["execute=cloud"], "execute: "),
    ],
)
def test_settings_of_execution(words: list[str], message: str, tmp_path: Path) -> None:
    result = in_process(targets_words(tmp_path, *words))
    assert result.exit_code == 2
    assert message in result.stderr
