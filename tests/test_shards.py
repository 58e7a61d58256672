"""Shards are plain tars and Parquet, written whole or not at all, by one run at a time."""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.targets import shard_targets
from shards import index as indexes
from shards import writer
from shards.cache import ShardCache
from shards.contract import CODES_SUFFIX, FORMAT_VERSION, META_SUFFIX, OK, SIDECAR_SCHEMA, TARGET_SUFFIX, sample_key
from shards.errors import ShardError, UserError
from shards.files import exclusive, file_sha256
from shards.index import compact, load, shard_list
from shards.reader import decode_sample, read_sample
from shards.writer import ShardWriter, differences, finish, naming, read_metadata, standing, write_table
from tests.helpers import ROOT, targets_settings
from tests.shard_helpers import FINGERPRINT, files, some_members, some_row, write_shard
from tests.test_contract import README

# Reading without our code


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_of_the_readme_import_nothing_of_ours() -> None:
    assert len(snippets()) == 2
    assert not re.search(r"(import|from) +(shards|pipeline|trainer|codec|configs)", "".join(snippets()))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # WebDataset leaves closing to the collector
@pytest.mark.parametrize("split", ["train", "validation"])
def test_plain_webdataset_reads_what_our_reader_reads(
    work: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"folder": work / "shards"}
    exec(snippets()[0], names)
    assert len(capsys.readouterr().out.splitlines()) == len(load(work / "shards", "validation"))

    plain = {key: sample for key, *sample in names["read"](split)}
    index = load(work / "shards", split)
    ours = [read_sample(index, number) for number in range(len(index))]
    assert list(plain) == [sample["__key__"] for sample in ours]
    for members in ours:
        (coarse, middle, fine), target, meta = plain[members["__key__"]]
        sample = decode_sample(members)
        codes_T7 = sample["codes"]
        assert coarse.tolist() == codes_T7[:, 0].tolist()
        assert middle.tolist() == codes_T7[:, 1:3].ravel().tolist()
        assert fine.tolist() == codes_T7[:, 3:].ravel().tolist()
        assert np.array_equal(target, sample["target"])
        assert meta == sample["meta"]
        assert 2 * len(codes_T7) * 2048 == len(target) + 4096 * (meta["context_before"] + meta["context_after"])
    gc.collect()


def test_an_index_that_is_replaced_while_it_is_read_is_the_one_that_was_checked(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = file_sha256(shards / "index.parquet"), shard_list(shards)
    samples, checked = len(load(shards, "train")), indexes._checked

    def and_then_replaced(folder: Path, cache: ShardCache) -> Any:
        found = checked(folder, cache)
        compact(folder, known[1:])
        return found

    monkeypatch.setattr(indexes, "_checked", and_then_replaced)
    found = load(shards, "train")
    assert (found.sha256, len(found)) == (before, samples)


def test_plain_pyarrow_counts_what_the_plan_holds(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"folder": str(work / "shards")}
    exec(snippets()[1], names)
    plan = pq.read_table(work / "plan.parquet").to_pylist()
    assert sum(names["statuses"].values()) == len(plan)
    assert names["statuses"]["ok"] == sum(row["status"] == "ok" for row in plan)
    seconds = sum(row["n_samples"] for row in plan if row["status"] == "ok") / 48_000
    assert names["hours"] == pytest.approx(seconds / 3600)
    assert "recording" in capsys.readouterr().out


def test_every_row_of_the_plan_is_one_row_of_one_sidecar(work: Path) -> None:
    plan = pq.read_table(work / "plan.parquet")
    assert plan.num_rows > 20
    planned = [(row["split"], row["shard"], sample_key(row["shard"], row["row"])) for row in plan.to_pylist()]
    found = []
    for path in sorted((work / "shards").glob("*/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.append((path.parent.name, int(path.stem), row["key"]))
            assert (row["offset"] is not None) == (row["status"] == OK)
    assert sorted(planned) == sorted(found)
    index = pq.read_table(work / "shards" / "index.parquet")
    assert list(zip(*index.select(["split", "shard", "key"]).to_pydict().values(), strict=True)) == planned


def test_offsets_cover_the_tar_without_gap_or_overlap(work: Path) -> None:
    for split, shard in shard_list(work / "shards"):
        path = work / "shards" / split / f"{shard:06d}.tar"
        rows = pq.read_table(path.with_suffix(".parquet"), filters=pc.field("status") == OK).to_pylist()
        end = 0
        for row in rows:
            assert row["offset"] == end
            end += row["length"]
        rest = path.read_bytes()[end:]
        assert len(rest) >= 1024
        assert not any(rest)


# Writing


def test_the_same_input_gives_the_same_bytes(work: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(work, tmp_path / "again", ignore=shutil.ignore_patterns("shards")))
    shard_targets(targets_settings(again))
    written = [name for name in files(work / "shards") if name != "settings.json"]  # it holds the folder's name
    assert len(written) == 10
    for name in written:
        assert (again / "shards" / name).read_bytes() == (work / "shards" / name).read_bytes(), name


def test_a_tar_is_ustar_with_nothing_of_the_machine_in_it(work: Path) -> None:
    with tarfile.open(work / "shards" / "train" / "000000.tar") as tar:
        members = tar.getmembers()
    assert [info.name.partition(".")[2] for info in members[:3]] == [CODES_SUFFIX, TARGET_SUFFIX, META_SUFFIX]
    assert {(info.mtime, info.mode, info.uid, info.gid, info.uname, info.gname) for info in members} == {
        (0, 0o644, 0, 0, "", "")
    }
    assert (work / "shards" / "train" / "000000.tar").read_bytes()[257:265] == b"ustar\x0000"


def test_a_shard_says_in_its_sidecar_what_its_tar_is(tmp_path: Path) -> None:
    write_shard(tmp_path)
    assert files(tmp_path) == ["000000.parquet", "000000.tar"]
    metadata = read_metadata(tmp_path / "000000.parquet")
    assert metadata == {
        "format_version": FORMAT_VERSION,
        "tar_bytes": (tmp_path / "000000.tar").stat().st_size,
        "tar_sha256": file_sha256(tmp_path / "000000.tar"),
        "fingerprint": FINGERPRINT,
    }
    table = pq.read_table(tmp_path / "000000.parquet")
    assert table.schema == SIDECAR_SCHEMA
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "failed"]
    assert table["crc32"].to_pylist()[3] is None


def interrupted(folder: Path) -> None:
    with ShardWriter(folder, 0, FINGERPRINT) as writer:
        writer.add(some_row(0), some_members(0))
        assert files(folder) == ["000000.tar.tmp"]
        raise KeyboardInterrupt


def test_an_exception_leaves_neither_tar_nor_sidecar(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    assert files(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from shards.writer import ShardWriter
with ShardWriter(Path(sys.argv[1]), 0, {}) as writer:
    writer.add({"key": "000000-00000"}, {"json": bytes(100_000)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_nothing_that_looks_done_and_can_be_repeated(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert process.returncode == -9
    assert files(tmp_path) == ["000000.tar.tmp"]
    assert not standing(tmp_path / "000000.parquet", {})
    write_shard(tmp_path)
    assert files(tmp_path) == ["000000.parquet", "000000.tar"]


@pytest.mark.parametrize("amid", ["file_sha256", "move"])
def test_a_writer_that_slept_takes_nothing_from_the_one_that_did_its_work(
    amid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still, its run was taken for dead, and another one cleaned up; it wakes as that one commits."""
    write_shard(tmp_path / "whole")
    folder, function = tmp_path / "shard", getattr(writer, amid)
    sleeper = ShardWriter(folder, 0, FINGERPRINT).__enter__()
    sleeper.add(some_row(0), some_members(0))
    (folder / "000000.tar.tmp").unlink()

    def after_it_woke(*words: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"000000\.tar\.tmp is another process's by now, or gone"):
            sleeper.__exit__(None, None, None)
        return function(*words)

    monkeypatch.setattr(writer, amid, after_it_woke)
    write_shard(folder)
    assert files(folder) == ["000000.parquet", "000000.tar"]
    assert all(path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes() for path in folder.iterdir())


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_fsync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "shard")
    with pytest.raises(OSError, match="No space left"):
        write_table(tmp_path / "table.parquet", pa.table({"a": [1]}), {})
    assert files(tmp_path) == []


def test_a_disk_that_is_full_leaves_what_stood_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    write_table(path, pa.table({"a": [1]}), {})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, pa.table({"a": [2]}), {})
    assert pq.read_table(path)["a"].to_pylist() == [1]
    assert files(tmp_path) == ["table.parquet"]


@pytest.mark.parametrize("again", [False, True])
def test_a_disk_that_fills_at_the_sidecar_leaves_what_was_there(again: bool, tmp_path: Path) -> None:
    if again:
        write_shard(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000000.parquet.next.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (standing(tmp_path / "000000.parquet", FINGERPRINT) is not None) == again


class FullFile(io.FileIO):
    """A file on a disk with room for `room` bytes; nothing fits afterwards, not even what waits in a buffer."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            full_disk()
        return super().write(data)


@pytest.mark.parametrize("buffer_size", [1, 8192])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 1])
def test_a_disk_that_fills_while_writing_leaves_nothing(
    share: float, buffer_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "whole")
    size = (tmp_path / "whole" / "000000.tar").stat().st_size
    monkeypatch.setattr(FullFile, "room", int(share * (size - 1)))
    ordinary = Path.open

    def small(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "w+b":
            return ordinary(self, mode, *arguments, **options)
        return io.BufferedRandom(FullFile(self, "w+b"), buffer_size)

    monkeypatch.setattr(Path, "open", small)
    folder = tmp_path / "shard"
    with pytest.raises(OSError, match="No space left") as error:
        write_shard(folder)
    assert files(folder) == []
    assert error.traceback  # what it holds is alive: the collector did not do the work


def test_the_sidecar_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    ordinary = Path.replace

    def watched(self: Path, target: Path) -> Path:
        names.append(target.name)
        return ordinary(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_shard(tmp_path)
    assert names == ["000000.parquet.next", "000000.tar", "000000.parquet"]


# Fingerprints and locks


def test_a_shard_of_this_run_standing_and_one_of_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "000000.parquet"
    assert not standing(path, FINGERPRINT)
    write_shard(tmp_path)
    assert standing(path, FINGERPRINT)
    for other, message in [
        ({**FINGERPRINT, "target_bits": 24}, "target_bits is 16, now 24"),
        ({**FINGERPRINT, "teacher": "sidon"}, "teacher is None, now sidon"),
        ({"plan_rows": "0", "target_bits": 16}, "snac is some SNAC, now None"),
    ]:
        with pytest.raises(ShardError) as error:
            standing(path, other)
        assert message in str(error.value)
        assert str(path) in str(error.value)


def test_what_a_kill_left_ahead_is_brought_to_its_end(tmp_path: Path) -> None:
    """It becomes the sidecar of the tar that it describes, and of no other."""
    write_shard(tmp_path)
    sidecar, tar = tmp_path / "000000.parquet", tmp_path / "000000.tar"
    left, whole = tmp_path / "000000.parquet.next", sidecar.read_bytes()
    sidecar.rename(left)
    finish(left)
    assert sidecar.read_bytes() == whole
    shutil.copy(sidecar, left)
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    sidecar.write_bytes(b"of this tar")
    finish(left)
    assert sidecar.read_bytes() == b"of this tar"
    assert not left.exists()


def test_other_settings_never_overwrite_shards(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    before = {name: (copy / "shards" / name).read_bytes() for name in files(copy / "shards") if "settings" not in name}
    with pytest.raises(ShardError, match="target_bits is 16, now 24"):
        shard_targets(targets_settings(copy, "target_bits=24"))
    assert all((copy / "shards" / name).read_bytes() == data for name, data in before.items())


HOLD = """
import sys
from pathlib import Path
from shards.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_writes_to_a_folder(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copy)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing here"):
            shard_targets(targets_settings(copy))
        other.kill()  # what dies lets go
        other.wait()
    with exclusive(copy), pytest.raises(UserError, match="another process"), exclusive(copy):
        pass
    shard_targets(targets_settings(copy))


def test_the_systems_errors_are_no_damage() -> None:
    with pytest.raises(OSError, match="No space left"), naming(Path("index.parquet")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ShardError, match=r"index\.parquet: damaged, or no file of ours"), naming(Path("index.parquet")):
        raise OSError("Corrupt snappy compressed data")  # as pyarrow says it


def test_of_what_is_nested_only_what_differs_is_said() -> None:
    found, expected = {"a": 1, "limits": {"x": 0, "y": 1}}, {"limits": {"y": 2, "x": 0}, "a": 1, "b": None}
    assert differences(found, expected) == "limits: y is 1, now 2"
    assert differences(found, {**found, "limits": {"y": 1, "x": 0}}) == ""
    assert differences(found, {"a": 1}) == "limits is {'x': 0, 'y': 1}, now None"
