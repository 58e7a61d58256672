"""Recordings in tars are read in place: their tokens are those of the files that the tars were made of."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from codec.audio import EXTENSIONS, Recording, probe
from pipeline.codes import shard_codes
from pipeline.inspect import inspect
from pipeline.plan import make_plan
from pipeline.settings import InspectSettings
from pipeline.sources import find
from pipeline.targets import shard_targets
from pipeline.tars import members
from shards.contract import FAILED, SIDECAR_SCHEMA
from shards.errors import ShardError
from shards.pieces import Part
from shards.reader import split_members
from shards.writer import write_table
from tests.command_helpers import rows_of
from tests.helpers import codes_settings, targets_settings
from tests.torture.readers import ENDLESS


def write_tars(recordings: Path, folder: Path) -> Path:
    """Two tars, WebDataset style: KEY.wav beside KEY.json that names the speaker."""
    folder.mkdir()
    files = sorted(recordings.glob("*/*.wav"))
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in files[number::2]:
                key = f"{path.parent.name}_{path.stem}"
                add(tar, f"{key}.json", json.dumps({"speaker": path.parent.name, "text": "?"}).encode())
                add(tar, f"{key}.wav", path.read_bytes())
            add(tar, "notes.txt", b"not to be read")
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def by_take(folder: Path) -> dict[str, list[Any]]:
    """Speaker and take → what a table says of its segments, wherever they stand."""
    found = {}
    for id, rows in rows_of(folder).items():
        name = id.rpartition(".tar/")[2].replace("_take", "/take")
        content = [row.get("codes") or (row.get("peak"), row.get("level_db")) for row in rows]
        found[name] = [(row["segment"], row["status"], value) for row, value in zip(rows, content, strict=True)]
    return {name: sorted(rows) for name, rows in found.items()}


def test_tars_hold_what_files_hold(recordings: Path, work: Path, tmp_path: Path) -> None:
    audio = write_tars(recordings, tmp_path / "tars")
    shard_codes(codes_settings(audio, tmp_path / "work"))
    shard_targets(targets_settings(tmp_path / "work"))
    for folder in ("codes", "shards"):
        assert by_take(tmp_path / "work" / folder) == by_take(work / folder)
    groups = {row["group"] for rows in rows_of(tmp_path / "work" / "shards").values() for row in rows}
    assert groups == {f"speaker_{n}" for n in range(4)}


def test_a_folder_is_one_group_in_whichever_tar_it_lies(recordings: Path, tmp_path: Path) -> None:
    audio = tmp_path / "tars"
    audio.mkdir()
    files = sorted(recordings.glob("*/*.wav"))
    for number in range(2):
        with tarfile.open(audio / f"{number}.tar", "w") as tar:
            for path in files[number::2]:
                add(tar, f"./{path.parent.name}/{path.name}", path.read_bytes())
            add(tar, "alone.wav", files[0].read_bytes())
    table, _ = find(audio, None)
    assert set(table["group"].to_pylist()) == {*(f"speaker_{n}" for n in range(4)), "0.tar", "1.tar"}
    pattern, _ = find(audio, r"^(\d)\.tar")
    assert set(pattern["group"].to_pylist()) == {"0", "1"}


def test_ids_and_what_is_ignored(recordings: Path, tmp_path: Path) -> None:
    audio = write_tars(recordings, tmp_path / "tars")
    table, ignored = find(audio, None)
    assert table["recording"][0].as_py() == "0.tar/speaker_0_take_0.wav"
    assert ignored == {".txt in tars": 2}
    assert find(audio / "1.tar", None)[0]["recording"].to_pylist() == [
        f"1.tar/speaker_{n}_take_1.wav" for n in range(4)
    ]
    assert set(find(audio, r"(speaker_\d)")[0]["group"].to_pylist()) == {f"speaker_{n}" for n in range(4)}


@pytest.mark.parametrize("damage", ["cut", "no end", "flipped", "text"])
def test_a_damaged_tar_has_a_row_that_says_so(damage: str, recordings: Path, tmp_path: Path) -> None:
    """Beside the rows of what can still be read of it."""
    audio = write_tars(recordings, tmp_path / "tars")
    path = audio / "1.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
        end = tar.offset
    if damage == "flipped":
        data[last.offset + 100] ^= 1
    cut = {"cut": last.offset_data + last.size // 2, "no end": end, "flipped": len(data), "text": 0}[damage]
    path.write_bytes(bytes(data[:cut]) or b"no tar at all" * 100)
    plan = make_plan(codes_settings(audio, tmp_path / "work"))
    rows = [row for number in range(len(plan.shards)) for row in plan.rows(number)]
    failed = {row["recording"]: row["reason"] for row in rows if row["status"] == FAILED}
    assert "1.tar" in failed
    assert "cut off or damaged" in failed["1.tar"] or "not readable as a tar" in failed["1.tar"]
    kept = {row["recording"] for row in rows if row["recording"].startswith("1.tar/")} - failed.keys()
    assert len(kept) == {"cut": 3, "no end": 4, "flipped": 3, "text": 0}[damage]


def test_a_part_is_a_file(recordings: Path, tmp_path: Path) -> None:
    path = recordings / "speaker_1" / "take_1.wav"
    data = path.read_bytes()
    (tmp_path / "whole").write_bytes(b"before" + data + b"after")
    part = Part(tmp_path / "whole", 6, len(data))
    with part.open() as file:
        assert file.read() == data
        file.seek(-10, io.SEEK_END)
        assert file.read(100) == data[-10:]
        file.seek(3)
        assert (file.read(4), file.tell()) == (data[3:7], 7)
        assert file.seek(-len(data) - 5, io.SEEK_END) == 0, "nothing before it is its own"
    assert probe(part) == probe(path)
    for ours, theirs in zip(Recording(part, probe(part)).blocks(), Recording(path, probe(path)).blocks(), strict=True):
        assert (ours == theirs).all()
    assert Part(tmp_path / "whole", 6, len(data) + 100).stat().st_size == len(data) + 5
    assert Part(tmp_path / "whole", len(data) + 100, 9).stat().st_size == 0


def test_what_a_tar_holds_and_is_no_recording_is_said(recordings: Path, tmp_path: Path) -> None:
    wav = (recordings / "speaker_0" / "take_0.wav").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "a/x.wav", wav)
        add(tar, "b/caf\xe9.wav", wav)
        add(tar, "c/y.wav", wav)
        add(tar, "c/y.json", b'{"speaker": "\\ud83d"}')
        add(tar, "d/z.json", b'{"speaker": "an')
        add(tar, "d/z.wav", wav)
        add(tar, "e/alone.json", b"{}")
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo(f"a/link_{kind.decode()}.wav")
            link.type, link.linkname = kind, "a/x.wav"
            tar.addfile(link)
    table, ignored = find(tmp_path, None)
    problems = dict(zip(table["recording"].to_pylist(), table["problem"].to_pylist(), strict=True))
    assert problems == {
        "a.tar/a/x.wav": None,
        "a.tar/b/caf\\xe9.wav": "file name is not UTF-8: rename it",
        "a.tar/c/y.wav": None,
        "a.tar/d/z.wav": "its speaker is not known: the .json beside it is not JSON of at most 1,048,576 bytes",
    }
    assert ignored == {".json in tars": 1, "links in tars": 2}
    assert table["group"].to_pylist()[2] == "?"


def test_a_tar_behind_another_is_not_overlooked(recordings: Path, tmp_path: Path) -> None:
    one, two = sorted(write_tars(recordings, tmp_path / "tars").glob("*.tar"))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    table = find(one, None)[0]
    (problem,) = table["problem"].drop_null().to_pylist()
    assert "more follows its end at byte" in problem


def test_sparse_members_are_refused(tmp_path: Path, recordings: Path) -> None:
    if not (program := shutil.which("tar")):
        pytest.skip("no tar program")
    folder = tmp_path / "a"
    folder.mkdir()
    data = (recordings / "speaker_0" / "take_0.wav").read_bytes()
    with (folder / "x.wav").open("wb") as file:
        file.write(data[:44])
        file.seek(1 << 20)
        file.write(data[44:])
    for kind in ("gnu", "pax"):
        subprocess.run(
            [program, f"--format={kind}", "-S", "-C", tmp_path, "-cf", tmp_path / f"{kind}.tar", "a"], check=True
        )
        (problem,) = find(tmp_path / f"{kind}.tar", None)[0]["problem"].to_pylist()
        assert problem == "a sparse member: pack the tar without --sparse"


def test_a_pipe_is_no_tar_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    (member,) = members(tmp_path / "a.tar", EXTENSIONS)
    assert member.problem == "not readable as a tar: empty file"


def test_a_header_of_endless_length_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "000000.tar"
    path.write_bytes(ENDLESS)
    (member,) = members(path, EXTENSIONS)
    assert member.problem
    assert member.problem.startswith("not readable as a tar: ")
    with pytest.raises(ShardError, match="not a whole tar"):
        split_members(ENDLESS, "000000-00000", path)
    write_table(path.with_suffix(".parquet"), SIDECAR_SCHEMA.empty_table(), {})
    with pytest.raises(ShardError, match="not a whole tar"):
        inspect(InspectSettings(path=path, rows=1))
