"""What was mended, replaced or lost between two runs: what stands stays, and codes meet the target of no other file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import soundfile

from pipeline.codes import shard_codes
from pipeline.plan import make_plan
from pipeline.recordings import content_crc32
from pipeline.settings import CodesSettings
from pipeline.targets import shard_targets
from pipeline.teachers import Teacher
from shards.contract import FAILED, OK, PLAN_NAME, REJECTED, TOO_SHORT
from shards.errors import ShardError
from shards.writer import read_table
from tests.command_helpers import in_process, refused, rows_of, stamps
from tests.helpers import ROOT, codes_settings, forget_contents, speechlike, targets_settings, targets_words

SOME = "max_failed_fraction=0.99"
CHANGED = "the file is not the one that its codes were made from"


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Three recordings of equal size and of one speaker, so that they share a shard, and one of another's."""
    for seed, name in enumerate(("a", "b", "c", "other/d")):
        path = tmp_path / "audio" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, speechlike(1.5, 24_000, seed), 24_000)
    return tmp_path / "audio"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def planned(audio: Path, work: Path, *more: str) -> CodesSettings:
    return codes_settings(audio, work, "segments_per_shard=16", *more)


def statuses(folder: Path) -> dict[str, set[str]]:
    found = rows_of(folder)
    return {name: {row["status"] for row in found[name] if row["status"] != TOO_SHORT} for name in sorted(found)[:3]}


def reasons(folder: Path, recording: str) -> set[str]:
    return {row["reason"] for row in rows_of(folder)[recording] if row["status"] == FAILED}


def swap(audio: Path) -> None:
    a, b = ((audio / name).read_bytes() for name in ("a.wav", "b.wav"))
    (audio / "a.wav").write_bytes(b)
    (audio / "b.wav").write_bytes(a)


def quieter(audio: Path) -> None:
    for name in ("a.wav", "b.wav"):
        samples, rate = soundfile.read(audio / name)
        soundfile.write(audio / name, samples / 2, rate)


@pytest.mark.parametrize("change", [swap, quieter])
def test_files_replaced_between_the_stages_fail(change: Callable[[Path], None], audio: Path, work: Path) -> None:
    """Of the same size and header; what is put back is taken again."""
    shard_codes(planned(audio, work))
    kept = shutil.copytree(audio, work.with_name("kept"))
    change(audio)
    shard_targets(targets_settings(work, SOME))
    assert statuses(work / "shards") == {"a.wav": {FAILED}, "b.wav": {FAILED}, "c.wav": {OK}}
    assert reasons(work / "shards", "a.wav") == reasons(work / "shards", "b.wav") == {CHANGED}
    shutil.copytree(kept, audio, dirs_exist_ok=True)
    shard_targets(targets_settings(work, "retry=failed"))
    assert statuses(work / "shards") == {"a.wav": {OK}, "b.wav": {OK}, "c.wav": {OK}}


def test_a_replaced_file_gets_new_codes_when_the_old_ones_are_deleted(audio: Path, work: Path) -> None:
    """As README.md says, together with its tar."""
    shard_codes(planned(audio, work))
    shard_targets(targets_settings(work))
    swap(audio)
    for path in [*work.glob("codes/train/*.parquet"), *work.glob("shards/train/*.tar")]:
        path.unlink()
    old, new = work, work.with_name("new")
    for folder in (old, new):
        shard_codes(planned(audio, folder))
        shard_targets(targets_settings(folder))
    for path in new.glob("shards/*/*"):
        assert (old / path.relative_to(new)).read_bytes() == path.read_bytes(), path


def test_codes_that_do_not_know_their_file_are_taken(audio: Path, work: Path) -> None:
    """Those of 0.1.0."""
    shard_codes(planned(audio, work))
    forget_contents(work)
    shard_targets(targets_settings(work))
    assert set.union(*statuses(work / "shards").values()) == {OK}


def test_other_limits_go_into_a_second_folder_over_plan_and_codes(audio: Path, work: Path, tmp_path: Path) -> None:
    """As docs/scale.md says; the first folder stays as it is, and says so when it is asked for them."""
    shard_codes(planned(audio, work))
    shard_targets(targets_settings(work))
    second, stricter = tmp_path / "second", "min_correlation=0.95"
    second.mkdir()
    shutil.copy(work / PLAN_NAME, second)
    (second / "codes").symlink_to(work / "codes")
    before = stamps(work)
    refused(targets_words(work, stricter), "use the settings of that run, or a second work folder with the same plan")
    assert in_process(targets_words(second, stricter)).exit_code == 0
    assert in_process(["verify", f"shards={second / 'shards'}"]).exit_code == 0
    assert rows_of(second / "shards") == rows_of(work / "shards"), "each is its own target and keeps any limit"
    assert stamps(work) == before

    (second / "codes").unlink()
    shard_codes(planned(audio, second))
    for path in work.glob("codes/*/*.parquet"):
        assert (second / path.relative_to(work)).read_bytes() == path.read_bytes()


def test_a_second_try_keeps_what_succeeded(audio: Path, work: Path, tmp_path: Path) -> None:
    """Also of recordings that are gone meanwhile; in the end the bytes are those of a run without failures."""
    whole = tmp_path / "whole"
    shard_codes(planned(audio, whole))
    shard_targets(targets_settings(whole))

    make_plan(planned(audio, work))
    away = shutil.move(audio / "b.wav", tmp_path / "b.wav")
    shard_codes(planned(audio, work, SOME))
    shutil.move(audio / "c.wav", tmp_path / "c.wav")
    shutil.move(away, audio / "b.wav")
    shard_codes(planned(audio, work, "retry=failed"))
    assert statuses(work / "codes") == {"a.wav": {OK}, "b.wav": {OK}, "c.wav": {OK}}

    shard_targets(targets_settings(work, SOME))
    assert statuses(work / "shards") == {"a.wav": {OK}, "b.wav": {OK}, "c.wav": {FAILED}}
    shutil.move(tmp_path / "c.wav", audio / "c.wav")
    (audio / "a.wav").unlink()
    shard_targets(targets_settings(work, "retry=failed"))
    for path in [*whole.glob("codes/*/*.parquet"), *whole.glob("shards/*/*")]:
        assert (work / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_a_second_try_that_mends_nothing_changes_nothing(audio: Path, work: Path) -> None:
    """Neither a codes file nor a tar is written again, and the index, which a training may read, stays."""
    make_plan(planned(audio, work))
    (audio / "b.wav").unlink()
    shard_codes(planned(audio, work, SOME))
    (audio / "c.wav").unlink()
    shard_targets(targets_settings(work, SOME))
    assert statuses(work / "shards") == {"a.wav": {OK}, "b.wav": {FAILED}, "c.wav": {FAILED}}
    before = stamps(work)
    shard_codes(planned(audio, work, "retry=failed", SOME))
    forget = Mock()
    with patch("pipeline.targets.forget", forget):
        shard_targets(targets_settings(work, "retry=failed", SOME))
    assert not forget.called
    changed = {name for name, stamp in stamps(work).items() if stamp != before[name]}
    assert all(name.endswith(("settings.json", "index.parquet", "SHA256SUMS")) for name in changed), changed


def test_what_is_kept_is_checked(audio: Path, work: Path, tmp_path: Path) -> None:
    shard_codes(planned(audio, work))
    shutil.move(audio / "b.wav", tmp_path / "b.wav")
    shard_targets(targets_settings(work, SOME))
    tar, *_ = (work / "shards").glob("*/*.tar")
    data = bytearray(tar.read_bytes())
    data[len(data) // 4] ^= 1
    tar.write_bytes(data)
    shutil.move(tmp_path / "b.wav", audio / "b.wav")
    with pytest.raises(ShardError, match="is damaged: delete the tar, its shard is made anew"):
        shard_targets(targets_settings(work, "retry=failed"))
    tar.unlink()
    shard_targets(targets_settings(work))
    assert set.union(*statuses(work / "shards").values()) == {OK}


def test_a_file_mended_to_another_size_is_taken(audio: Path, work: Path) -> None:
    """As long as it is as long as planned."""
    samples, rate = soundfile.read(audio / "b.wav")
    (audio / "b.wav").unlink()
    soundfile.write(audio / "b.flac", samples, rate)
    good = (audio / "b.flac").read_bytes()
    (audio / "b.flac").write_bytes(good[: len(good) // 2])
    shard_codes(planned(audio, work, SOME))
    assert statuses(work / "codes")["b.flac"] == {FAILED}
    (audio / "b.flac").write_bytes(good)
    shard_codes(planned(audio, work, "retry=failed"))
    shard_targets(targets_settings(work))
    assert set.union(*statuses(work / "shards").values()) == {OK}


@pytest.mark.parametrize(
    ("size", "rate", "frames"), [(70_000, 16_000, 35_000), (4096, 44_100, 9_000_000), (3, 8_000, 9)]
)
def test_segments_together_know_every_byte(size: int, rate: int, frames: int, tmp_path: Path) -> None:
    """Whatever byte differs, a segment notices, and its neighbours do not."""
    path, random = tmp_path / "file", np.random.default_rng(size)
    data = random.bytes(size)
    length = 7
    count = -(-frames * 24_000 // (rate * length * 2048))
    place = {"first_frame": 0, "file_frames": frames, "rate": rate, "n_coarse": length}
    rows = [{**place, "start_coarse": number * length} for number in range(count)]

    def crcs(content: bytes) -> list[int]:
        path.write_bytes(content)
        return [content_crc32(path, row) for row in rows]

    before = crcs(data)
    for changed in {0, size - 1, size // 3, *random.integers(0, size, 20).tolist()}:
        other = bytearray(data)
        other[changed] ^= 1
        assert sum(a != b for a, b in zip(crcs(bytes(other)), before, strict=True)) == 1
    assert crcs(data + b"\0")[-1] != before[-1]


def test_a_pipe_is_a_reason_and_no_wait(audio: Path, work: Path) -> None:
    """A manifest that states lengths has no file opened before."""
    os.mkfifo(audio / "pipe.wav")
    rows = [f"{path},36000,24000,{path.parent.name}" for path in sorted(audio.rglob("*.wav"))]
    (audio / "list.csv").write_text("\n".join(["path,frames,rate,speaker", *rows]) + "\n")
    shard_codes(planned(audio / "list.csv", work, SOME))
    assert reasons(work / "codes", str(audio / "pipe.wav")) == {"the file is empty"}


def test_what_was_rejected_is_not_restored_again(
    audio: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = 1000 * speechlike(1.5, 24_000, 0)  # beyond full scale
    soundfile.write(audio / "a.wav", loud, 24_000, "FLOAT")
    shard_codes(planned(audio, work))
    shutil.move(audio / "b.wav", tmp_path / "b.wav")
    shard_targets(targets_settings(work, SOME))
    assert statuses(work / "shards") == {"a.wav": {REJECTED}, "b.wav": {FAILED}, "c.wav": {OK}}
    shutil.move(tmp_path / "b.wav", audio / "b.wav")
    asked, segments = list[str](), Teacher.segments

    def watched(self: Teacher, recordings: Sequence[list[dict[str, Any]]]) -> Iterator[Any]:
        asked.extend(rows[0]["recording"] for rows in recordings)
        return segments(self, recordings)

    monkeypatch.setattr(Teacher, "segments", watched)
    shard_targets(targets_settings(work, "retry=failed", SOME))
    assert statuses(work / "shards") == {"a.wav": {REJECTED}, "b.wav": {OK}, "c.wav": {OK}}
    assert asked == ["b.wav"]


def test_a_sample_with_other_codes_than_those_that_stand_is_not_kept(audio: Path, work: Path, tmp_path: Path) -> None:
    shard_codes(planned(audio, work))
    shutil.move(audio / "b.wav", tmp_path / "b.wav")
    shard_targets(targets_settings(work, SOME))
    shutil.move(tmp_path / "b.wav", audio / "b.wav")
    soundfile.write(audio / "a.wav", speechlike(1.5, 24_000, 9), 24_000)
    for path in work.glob("codes/train/*.parquet"):
        path.unlink()
    shard_codes(planned(audio, work))
    with pytest.raises(ShardError, match="has other codes than codes/: delete the tar, its shard is made anew"):
        shard_targets(targets_settings(work, "retry=failed"))
    for path in work.glob("shards/train/*.tar"):
        path.unlink()
    shard_targets(targets_settings(work))
    assert set.union(*statuses(work / "shards").values()) == {OK}


DIE = """
import os, sys
from pathlib import Path
from pipeline.__main__ import main

left, ordinary = int(sys.argv[1]), Path.replace

def replace(self, target):
    global left
    ordinary(self, target)
    left -= target.parent.name == "train"
    if not left:
        os._exit(9)

Path.replace = replace
main(sys.argv[2:])
"""


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_a_second_try_may_be_killed_between_tar_and_sidecar(
    renamed: int, audio: Path, work: Path, tmp_path: Path
) -> None:
    """Nothing of what had succeeded is lost, although its recordings are gone."""
    whole = tmp_path / "whole"
    for folder in (whole, work):
        shard_codes(planned(audio, folder))
    shard_targets(targets_settings(whole))
    shutil.move(audio / "b.wav", tmp_path / "b.wav")
    shard_targets(targets_settings(work, SOME))
    shutil.move(tmp_path / "b.wav", audio / "b.wav")
    (audio / "a.wav").unlink()
    again = targets_words(work, "retry=failed")
    died = subprocess.run([sys.executable, "-c", DIE, str(renamed), *again], cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == 9, died.stderr
    if renamed < 3:
        assert not (work / "shards" / "index.parquet").exists(), "it would be wrong of the new tar"
    assert in_process(again).exit_code == 0
    for path in whole.glob("shards/*/*"):
        assert (work / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert not list(work.glob("shards/*/*.next"))
    assert in_process(["verify", f"shards={work / 'shards'}"]).exit_code == 0


def test_a_second_try_above_the_limit_leaves_no_wrong_index(audio: Path, work: Path, tmp_path: Path) -> None:
    shard_codes(planned(audio, work))
    for name in ("a.wav", "b.wav"):
        shutil.move(audio / name, tmp_path / name)
    shard_targets(targets_settings(work, SOME))
    shutil.move(tmp_path / "b.wav", audio / "b.wav")
    refused(
        targets_words(work, "retry=failed", "max_failed_fraction=0.05"),
        "What succeeded is kept: raise max_failed_fraction, or mend",
    )
    assert not (work / "shards" / "index.parquet").exists()
    shard_targets(targets_settings(work, SOME))
    assert in_process(["verify", f"shards={work / 'shards'}"]).exit_code == 0


def test_only_shards_where_something_failed_are_made_again(audio: Path, work: Path) -> None:
    """Among them one where nothing else is."""
    shard_codes(codes_settings(audio, work, "segments_per_shard=2"))
    kept = shutil.copytree(audio, work.with_name("kept"))
    swap(audio)
    shard_targets(targets_settings(work, SOME))
    shards = work / "shards"
    tables = {str(path.relative_to(shards)): read_table(path) for path in shards.glob("*/*.parquet")}
    found = {name: {*table["status"].to_pylist()} for name, table in tables.items()}
    assert {FAILED} in found.values()
    before = stamps(shards)
    for name in ("a.wav", "b.wav"):
        shutil.copyfile(kept / name, audio / name)
    shard_targets(targets_settings(work, SOME, "retry=failed"))
    after = stamps(shards)
    again = {name for name in found if after[name] != before[name]}
    assert again == {name for name, of in found.items() if FAILED in of}
    assert all({*read_table(shards / name)["status"].to_pylist()} == {OK} for name in again)
