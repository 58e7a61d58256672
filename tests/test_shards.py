from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.inspect import inspect
from pipeline.settings import InspectSettings, VerifySettings
from pipeline.targets import flac_bytes, shard_targets
from pipeline.verify import verify
from shards import reader
from shards.contract import (
    CODES_SUFFIX,
    FORMAT_VERSION,
    META_SUFFIX,
    OK,
    SIDECAR_SCHEMA,
    TARGET_SUFFIX,
    flatten_codes,
    npy_bytes,
    sample_key,
)
from shards.errors import ShardError, UserError
from shards.files import exclusive, file_sha256, replacing
from shards.index import compact, load, problems, read_sums, shard_list, unlisted, write_sums
from shards.reader import decode_sample, read_sample, split_members
from shards.writer import ShardWriter, is_done, read_metadata, write_table
from tests.helpers import ROOT, run_command, targets_settings
from tests.test_contract import README, some_codes, some_meta

FINGERPRINT = {"plan_rows": "0", "snac": "some SNAC", "target_bits": 16}
SHARD = ("train", 0)


@pytest.fixture
def shards(work: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(work / "shards", tmp_path / "shards"))


def some_members(row: int) -> dict[str, bytes]:
    target = np.random.default_rng(row).uniform(-0.5, 0.5, 4 * 4096).astype(np.float32)
    return {
        CODES_SUFFIX: npy_bytes(flatten_codes(some_codes(8, seed=row))),
        TARGET_SUFFIX: flac_bytes(target, 16),
        META_SUFFIX: json.dumps(some_meta(segment=row), sort_keys=True).encode(),
    }


def some_row(row: int) -> dict[str, Any]:
    return {"key": sample_key(0, row), "recording": "a/b.wav", "group": "a", "segment": row, "status": OK}


def write_shard(folder: Path, rows: int = 3, fingerprint: dict[str, Any] = FINGERPRINT) -> None:
    with ShardWriter(folder, 0, fingerprint) as writer:
        for row in range(rows):
            writer.add(some_row(row), some_members(row))
        writer.add_row({**some_row(rows), "status": "failed", "reason": "broken"})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
    assert not is_done(tmp_path / "000000.parquet", {})
    write_shard(tmp_path)
    assert files(tmp_path) == ["000000.parquet", "000000.tar"]


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


def test_a_disk_that_fills_at_the_sidecar_leaves_a_shard_that_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "000000.parquet.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path)
    assert files(tmp_path) == ["000000.tar"]
    assert not is_done(tmp_path / "000000.parquet", FINGERPRINT)


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
    assert names == ["000000.tar", "000000.parquet"]


def test_bytes_reach_the_disk_before_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        calls.append("rename " + target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_rename)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert calls == ["fsync file.tmp", "rename file", f"fsync {tmp_path.name}"]


# Fingerprints and locks


def test_a_shard_of_this_run_is_done_and_one_of_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "000000.parquet"
    assert not is_done(path, FINGERPRINT)
    write_shard(tmp_path)
    assert is_done(path, FINGERPRINT)
    for other, message in [
        ({**FINGERPRINT, "target_bits": 24}, "target_bits is 16, now 24"),
        ({**FINGERPRINT, "teacher": "sidon"}, "teacher is None, now sidon"),
        ({"plan_rows": "0", "target_bits": 16}, "snac is some SNAC, now None"),
    ]:
        with pytest.raises(ShardError) as error:
            is_done(path, other)
        assert message in str(error.value)
        assert str(path) in str(error.value)


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


# Damage


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flip_data(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[int(random.integers(len(tar.getmembers())))]
    flip(path, info.offset_data + int(random.integers(info.size)), int(random.integers(8)))


def flip_header(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    with tarfile.open(path) as tar:
        info = tar.getmembers()[int(random.integers(len(tar.getmembers())))]
    flip(path, info.offset + int(random.integers(512)), int(random.integers(8)))


def flip_padding(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    flip(path, path.stat().st_size - 1 - int(random.integers(1024)), int(random.integers(8)))


def cut_tar(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.tar"
    os.truncate(path, int(random.integers(path.stat().st_size)))


def lengthen_tar(shards: Path, random: np.random.Generator) -> None:
    with (shards / "train" / "000000.tar").open("ab") as file:
        file.write(bytes(512))


def remove_tar(shards: Path, random: np.random.Generator) -> None:
    (shards / "train" / "000000.tar").unlink()


def swap_tars(shards: Path, random: np.random.Generator) -> None:
    a, b, c = (shards / "train" / name for name in ("000000.tar", "000001.tar", "between"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def swap_shards(shards: Path, random: np.random.Generator) -> None:
    swap_tars(shards, random)
    a, b, c = (shards / "train" / name for name in ("000000.parquet", "000001.parquet", "between"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def remove_sidecar(shards: Path, random: np.random.Generator) -> None:
    (shards / "train" / "000000.parquet").unlink()


def cut_sidecar(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    os.truncate(path, int(random.integers(path.stat().st_size)))


def drop_a_row(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    row = int(random.integers(table.num_rows))
    pq.write_table(pa.concat_tables([table.slice(0, row), table.slice(row + 1)]), path)


def drop_a_column(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([table.column_names[int(random.integers(table.num_columns))]]), path)


def widen_a_column(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("n_samples")
    pq.write_table(table.set_column(place, "n_samples", table["n_samples"].cast(pa.int64())), path)


def edit_value(path: Path, column: str, row: int) -> None:
    """As a well-meaning hand would."""
    table = pq.read_table(path)
    field = table.schema.field(column)
    values = table[column].to_pylist()
    other = {"string": "edited", "float": 0.25, "double": 0.25}.get(str(field.type), 1)
    values[row] = None if values[row] == other else other
    changed = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def lose_metadata(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000000.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def index_of_another_set(shards: Path, random: np.random.Generator) -> None:
    path = shards / "train" / "000001.parquet"
    kept = path.read_bytes()
    edit_value(path, "crc32", 1)
    compact(shards, shard_list(shards))
    path.write_bytes(kept)


def index_of_fewer_shards(shards: Path, random: np.random.Generator) -> None:
    compact(shards, shard_list(shards)[:-1])


def index_of_more_shards(shards: Path, random: np.random.Generator) -> None:
    for suffix in (".tar", ".parquet"):
        (shards / "train" / "000002").with_suffix(suffix).unlink()


DAMAGES: list[tuple[Callable[[Path, np.random.Generator], None], int]] = [
    (flip_data, 8),
    (flip_header, 8),
    (flip_padding, 4),
    (cut_tar, 6),
    (lengthen_tar, 1),
    (remove_tar, 1),
    (swap_tars, 1),
    (swap_shards, 1),
    (remove_sidecar, 1),
    (cut_sidecar, 6),
    (drop_a_row, 3),
    (drop_a_column, 3),
    (widen_a_column, 1),
    (lose_metadata, 1),
    (index_of_another_set, 1),
    (index_of_fewer_shards, 1),
    (index_of_more_shards, 1),
]


def all_problems(shards: Path) -> list[str]:
    sums, listed = read_sums(shards), shard_list(shards)
    return [problem for shard in listed for problem in problems(shards, *shard, sums)] + list(unlisted(shards, listed))


@pytest.mark.parametrize(("damage", "times"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_always_found(
    damage: Callable[[Path, np.random.Generator], None], times: int, work: Path, tmp_path: Path
) -> None:
    for seed in range(times):
        shards = Path(shutil.copytree(work / "shards", tmp_path / str(seed)))
        assert all_problems(shards) == []
        damage(shards, np.random.default_rng(seed))
        found = all_problems(shards)
        assert found, f"seed {seed}"
        assert all("\n" not in problem and problem.startswith(str(shards)) for problem in found)


@pytest.mark.parametrize("column", SIDECAR_SCHEMA.names)
def test_an_edited_value_of_any_column_is_found(column: str, shards: Path) -> None:
    path = shards / "train" / "000000.parquet"
    edit_value(path, column, SIDECAR_SCHEMA.names.index(column) % pq.read_metadata(path).num_rows)
    assert all_problems(shards) == [
        f"{path}: its sha256 is not that of SHA256SUMS",
        f"{path}: its rows are not those of the index",
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("format_version", 99, "000000.parquet has format 99, this version reads 2"),
        ("tar_bytes", 512, "bytes, its sidecar says 512"),
        ("tar_sha256", "0", "000000.tar: its sha256 is not the sidecar's"),
        ("fingerprint", {"target_bits": 24}, "000000.parquet: made by another run than the index"),
    ],
)
def test_edited_metadata_is_found(key: str, value: object, problem: str, shards: Path) -> None:
    path = shards / "train" / "000000.parquet"
    write_table(path, pq.read_table(path), {**read_metadata(path), key: value})
    assert problem in all_problems(shards)[-1]


def test_each_damaged_sample_is_named(shards: Path) -> None:
    index = load(shards, "train")
    rows = index.table.filter(pc.field("shard") == 0).to_pylist()
    for row in rows[1:4]:
        flip(shards / "train" / "000000.tar", row["offset"] + row["length"] // 2, 3)
    found = "\n".join(all_problems(shards))
    assert [key for key in index.table["key"].to_pylist() if key in found] == [row["key"] for row in rows[1:4]]


def test_a_damaged_index_is_an_error_of_one_kind(shards: Path) -> None:
    path = shards / "index.parquet"
    good = path.read_bytes()
    reference = load(shards, "train").table
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        flip(path, int(random.integers(len(good))), int(random.integers(8)))
        try:
            intact = load(shards, "train").table.equals(reference)
        except ShardError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert intact or all_problems(shards)
        path.write_bytes(good)
    assert refused > 10


def test_an_index_of_other_columns_is_refused(shards: Path) -> None:
    path = shards / "index.parquet"
    table = pq.read_table(path)
    changed = table.rename_columns({"crc32": "crc38"})
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    write_sums(shards, {**read_sums(shards), path.name: file_sha256(path)})
    with pytest.raises(ShardError, match="crc32 is uint32, now None"):
        load(shards, "train")


def test_an_index_of_another_format_is_refused(shards: Path) -> None:
    path = shards / "index.parquet"
    write_table(path, pq.read_table(path), {**read_metadata(path), "format_version": 99})
    with pytest.raises(ShardError, match="format 99, this version reads 2"):
        load(shards, "train")
    write_table(path, pq.read_table(path), {"format_version": FORMAT_VERSION})
    with pytest.raises(ShardError, match=r"index\.parquet: its sha256 is not that of SHA256SUMS"):
        load(shards, "train")
    (shards / "SHA256SUMS").write_text("no sums\n")
    with pytest.raises(ShardError, match="SHA256SUMS: damaged, or not made by"):
        load(shards, "train")
    (shards / "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match="SHA256SUMS is missing"):
        load(shards, "train")
    path.unlink()
    with pytest.raises(ShardError, match=r"index\.parquet is missing"):
        load(shards, "train")


def test_folder_names_that_look_like_columns_add_none(work: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(work / "shards", tmp_path / "speaker=1" / "shards"))
    assert all_problems(shards) == []
    assert load(shards, "train").table.equals(load(work / "shards", "train").table)


# One sample


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_sample_that_cannot_be_read_is_tried_again_then_named(
    damage: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load(shards, "train")
    row = index.table.slice(4, 1).to_pylist()[0]
    path = shards / "train" / f"{row['shard']:06d}.tar"
    if damage == "flip":
        flip(path, row["offset"] + row["length"] - 1, 0)
    elif damage == "cut":
        os.truncate(path, row["offset"] + row["length"] - 1)
    else:
        path.unlink()
    waits = no_waiting(monkeypatch)
    with pytest.raises(ShardError) as error:
        read_sample(index, 4)
    assert len(waits) == reader.READ_ATTEMPTS - 1
    assert waits == sorted(waits)
    assert waits[0] > 0
    assert str(path) in str(error.value)
    assert row["key"] in str(error.value)


def test_a_read_that_fails_once_costs_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load(work / "shards", "train")
    expected = read_sample(index, 3)
    waits = no_waiting(monkeypatch)
    ordinary, reads = os.pread, []

    def unreliable(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) == 1:
            raise OSError(errno.EIO, "I/O error")
        return bytes(length) if len(reads) == 2 else ordinary(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", unreliable)
    assert read_sample(index, 3) == expected
    assert len(waits) == 2


def tar_bytes(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, "/etc/hostname"
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


KEY = "000000-00007"
WHOLE = {f"{KEY}.{suffix}": data for suffix, data in some_members(7).items()}
FOREIGN = [
    {**WHOLE, f"{KEY}.pth": b"pickle"},
    {**WHOLE, f"{KEY}.codes.pyd": b"pickle"},
    {**WHOLE, "../x": b"outside"},
    {**WHOLE, "/tmp/x": b"outside"},
    {name.replace(KEY, f"../{KEY}"): data for name, data in WHOLE.items()},
    {name.replace(KEY, "000000-00008"): data for name, data in WHOLE.items()},
    dict(list(WHOLE.items())[:2]),
    {},
]


def test_members_are_taken_apart_by_suffix() -> None:
    found = split_members(tar_bytes(WHOLE), KEY, Path("some.tar"))
    assert found == {**some_members(7), "__key__": KEY, "__url__": "some.tar"}
    assert decode_sample(found)["meta"]["segment"] == 7


@pytest.mark.parametrize("members", FOREIGN, ids=[str(number) for number in range(len(FOREIGN))])
def test_other_members_than_the_three_are_refused(members: dict[str, bytes]) -> None:
    with pytest.raises(ShardError) as error:
        split_members(tar_bytes(members), KEY, Path("some.tar"))
    assert str(error.value).startswith(f"some.tar: {KEY}: ")
    assert "expected" in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_plain_files_are_refused(kind: bytes) -> None:
    with pytest.raises(ShardError, match="no plain file"):
        split_members(tar_bytes(WHOLE, kind), KEY, Path("some.tar"))


def test_a_member_that_stands_twice_is_refused() -> None:
    first = dict.fromkeys(list(WHOLE)[:1], b"other")
    data = tar_bytes(first)[:1024] + tar_bytes(WHOLE)
    with pytest.raises(ShardError, match="holds"):
        split_members(data, KEY, Path("some.tar"))


def test_a_cut_sample_is_refused_wherever_it_is_cut() -> None:
    data = tar_bytes(WHOLE)
    end = len(data.rstrip(b"\0"))
    for length in np.random.default_rng(0).integers(0, end, 60).tolist():
        with pytest.raises(ShardError, match=rf"^some\.tar: {KEY}: "):
            decode_sample(split_members(data[:length], KEY, Path("some.tar")))


def stereo_flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((4 * 4096, 2)), 48_000, format="FLAC")
    return buffer.getvalue()


def mono_wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(4 * 4096), 48_000, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        (TARGET_SUFFIX, b"no audio", "target is not readable FLAC"),
        (TARGET_SUFFIX, stereo_flac(), "FLAC of 2 channels, expected FLAC of one"),
        (TARGET_SUFFIX, mono_wav(), "target is WAV"),
        (TARGET_SUFFIX, flac_bytes(np.zeros(4096, np.float32), 16), "4096 samples at 48000 Hz, expected 16384"),
        (CODES_SUFFIX, npy_bytes(flatten_codes(some_codes(7))), "7 coarse tokens, metadata says 1"),
        (META_SUFFIX, b"{}", "metadata field format_version"),
    ],
)
def test_a_sample_against_the_contract_is_refused_by_name(suffix: str, data: bytes, message: str) -> None:
    members = {**some_members(7), suffix: data, "__key__": KEY, "__url__": "some.tar"}
    with pytest.raises(ShardError, match=message) as error:
        decode_sample(members)
    assert str(error.value).startswith(f"some.tar: {KEY}: ")


@pytest.mark.parametrize("bits", [16, 24])
def test_any_part_of_a_target_is_that_of_the_whole(bits: int) -> None:
    target = np.random.default_rng(0).uniform(-0.5, 0.5, 4 * 4096).astype(np.float32)
    members = {**some_members(7), TARGET_SUFFIX: flac_bytes(target, bits), "__key__": KEY, "__url__": "some.tar"}
    whole = decode_sample(members)
    for first in range(4):
        for last in range(first + 1, 5):
            part = decode_sample(members, partial(lambda tokens, meta: tokens, range(first, last)))
            assert np.array_equal(part["target"], whole["target"][first * 4096 : last * 4096])
            assert np.array_equal(part["codes"], whole["codes"])


# The commands


def test_verify_finds_whole_shards_whole(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(VerifySettings(shards=work / "shards"))
    assert "4 shards are whole" in capsys.readouterr().out


def test_verify_as_a_command_says_each_problem_in_one_line(shards: Path) -> None:
    whole = run_command("pipeline", "verify", f"shards={shards}")
    assert (whole.returncode, whole.stdout) == (0, f"{shards}: 4 shards are whole\n")

    index = load(shards, "train")
    row = index.table.slice(0, 1).to_pylist()[0]
    flip(shards / "train" / "000000.tar", row["offset"] + 700, 1)
    (shards / "train" / "000001.tar").unlink()
    damaged = run_command("pipeline", "verify", f"shards={shards}")
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines() == [
        f"{shards}/train/000000.tar: its sha256 is not the sidecar's",
        f"{shards}/train/000000.tar: {row['key']}: crc32 differs",
        f"{shards}/train/000001.tar: missing",
    ]
    assert damaged.stderr.splitlines()[-1].startswith("error: 3 problem(s) in 4 shards")
    assert "Traceback" not in damaged.stderr


def test_verify_of_no_shards_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="just shard-targets"):
        verify(VerifySettings(shards=tmp_path))


def test_verify_names_shards_that_the_index_does_not_know(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact(shards, shard_list(shards)[1:])
    with pytest.raises(ShardError, match=r"2 problem\(s\) in 3 shards"):
        verify(VerifySettings(shards=shards))
    assert capsys.readouterr().out.splitlines() == [
        f"{shards}/train/000000.parquet: not in the index",
        f"{shards}/train/000000.tar: not in the index",
    ]


def test_what_is_damaged_can_be_made_again(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    os.truncate(copy / "shards" / "train" / "000000.tar", 5000)
    (copy / "shards" / "train" / "000001.tar").unlink()
    (copy / "shards" / "train" / "000002.parquet").unlink()
    shard_targets(targets_settings(copy))
    assert all_problems(copy / "shards") == []
    assert (copy / "shards" / "index.parquet").read_bytes() == (work / "shards" / "index.parquet").read_bytes()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("plan.parquet", ["29 rows", "segment_length", "statuses: {'ok': 24, 'too_short': 5}", "usable: 24 segments"]),
        ("codes/train/000000.parquet", ["8 rows", "snac_sha256", "key=000000-00000", "codes=["]),
        ("shards/train/000000.parquet", ["8 rows", "tar_sha256", "key=000000-00000", "level_db="]),
        ("shards/index.parquet", ["29 rows", "fingerprint", "split=train"]),
        ("shards/train/000000.tar", ["18 members, 6 samples", "000000-00000: codes (10, 7), target (28672,)"]),
        ("shards", ["index.parquet: 29 rows"]),
        (".", ["shards/index.parquet: 29 rows"]),
    ],
)
def test_inspect_prints_each_kind_of_file(
    file: str, expected: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(InspectSettings(path=work / file, rows=2))
    out = capsys.readouterr().out
    for text in expected:
        assert text in out
    assert len(re.findall(r"^  (?:\d{6}-\d{5}: |key=|split=)", out, flags=re.MULTILINE)) == 2


def test_inspect_says_what_it_expects(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "cut.parquet").write_bytes((work / "plan.parquet").read_bytes()[:1000])
    (tmp_path / "alone.tar").write_bytes((work / "shards" / "train" / "000000.tar").read_bytes())
    (tmp_path / "folder.tar").mkdir()
    for name, message in [
        ("notes.txt", r"expected a \.parquet or \.tar of ours, or a folder with index\.parquet"),
        ("absent.parquet", "expected a"),
        (".", "expected a"),
        ("folder.tar", "expected a"),
        ("cut.parquet", "damaged, or no file of ours"),
        ("alone.tar", r"expected its sidecar alone\.parquet beside it"),
    ]:
        with pytest.raises(UserError, match=message):
            inspect(InspectSettings(path=tmp_path / name, rows=2))


@pytest.mark.parametrize("length", [0, 100, 3000, 100_000])
def test_inspect_names_a_cut_tar(length: int, shards: Path) -> None:
    path = shards / "train" / "000000.tar"
    os.truncate(path, length)
    with pytest.raises(ShardError, match=re.escape(str(path))):
        inspect(InspectSettings(path=path, rows=1000))


def test_coreutils_check_the_sums(shards: Path) -> None:
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=shards, check=False).returncode == 0
    flip(shards / "index.parquet", 100, 0)
    assert subprocess.run(check, cwd=shards, check=False, capture_output=True).returncode == 1
