"""Every recording of a folder or manifest is in the plan, with its group or with the reason why it cannot be used."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pipeline.sources import find
from shards.contract import FAILED, OK, Row
from shards.errors import UserError
from tests.test_plan import planned, write


def manifest(folder: Path, kind: str, rows: list[Row]) -> Path:
    path = folder / f"list.{kind}"
    table = pa.Table.from_pylist(
        rows, schema=pa.schema({key: pa.array([row[key] for row in rows]).type for key in rows[0]})
    )
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    audio = tmp_path / "audio"
    for name in ("anna/1.wav", "anna/deep/2.FLAC", "ben/3.ogg", "ben/4.mp3", "top.wav"):
        write(audio / name)
    os.truncate(audio / "ben/4.mp3", 0)
    for name in ("notes.txt", "anna/cover.JPG", "ben/more.txt", "LICENSE\x1b", "anna/1.48k.wav"):
        (audio / name).touch()
    (audio / "anna" / "loop").symlink_to(audio, target_is_directory=True)
    (audio / "self.wav").symlink_to(audio / "self.wav")
    write(tmp_path / "elsewhere" / "5.wav")
    (audio / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with open(os.fsencode(audio) + b"/caf\xe9.wav", "wb"):  # noqa: PTH123 (not a name that a Path may hold)
        pass
    rows = {row["recording"]: row for row in planned(audio, tmp_path / "work", "segment_length=10")}
    assert {id: row["group"] for id, row in rows.items()} == {
        "anna/1.wav": "anna",
        "anna/deep/2.FLAC": "anna/deep",
        "ben/3.ogg": "ben",
        "ben/4.mp3": "ben",
        "top.wav": ".",
        "self.wav": ".",
        "caf\\xe9.wav": ".",
        "linked/5.wav": "linked",
    }
    failed = {id: row["reason"] for id, row in rows.items() if row["status"] == FAILED}
    assert failed == {
        "ben/4.mp3": "the file is empty",
        "self.wav": "no such file",
        "caf\\xe9.wav": "file name is not UTF-8: rename it",
    }
    assert {row["status"] for id, row in rows.items() if id not in failed} == {OK}
    printed = capfd.readouterr().out
    assert "ignored: 2 × .txt" in printed
    assert "1 × .jpg" in printed
    assert "1 × LICENSE\\x1b" in printed
    assert "1 × .48k.wav" in printed, "what `just decode` made of a recording beside it"


def test_a_disk_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Its mount point is empty, a link to it leads nowhere, or to what the system cannot look at."""
    audio = tmp_path / "audio"
    write(audio / "disk_1" / "a.wav")
    (audio / "disk_2").mkdir()
    (audio / "disk_3").symlink_to(tmp_path / "mnt" / "disk_3")
    found, ignored = find(audio, None)
    assert found["recording"].to_pylist() == ["disk_1/a.wav"]
    assert ignored == {"empty folder": 1, "disk_3 (a link to nowhere: is it mounted?)": 1}
    (audio / "disk_4").symlink_to(tmp_path / (256 * "x"))
    with pytest.raises(UserError, match="disk_4: File name too long"):
        find(audio, None)


def test_what_only_root_may_read_at_a_mount_point_is_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    write(tmp_path / "lost+found" / "#12.wav")
    found, ignored = find(tmp_path, None)
    assert (found["recording"].to_pylist(), ignored) == (["a.wav"], {"lost+found": 1})


def test_a_folder_whose_own_name_is_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    folder.mkdir()
    (folder / "a.wav").touch()
    (source,) = find(folder, None)[0].to_pylist()
    assert (source["recording"], source["problem"]) == ("a.wav", "file name is not UTF-8: rename it")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: f, "holds no recordings .*flac.*; found: 1 × empty folder$"),
        (lambda f: (f / "a.txt").touch() or f, "holds no recordings .*flac.*; found: 1 × .txt$"),
        (lambda f: f / "missing", "no such folder or manifest"),
    ],
)
def test_nothing_to_plan(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        find(make(tmp_path), None)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest(kind: str, tmp_path: Path) -> None:
    long, other = write(tmp_path / "in" / "long.wav", 10.0), write(tmp_path / "else" / "other.wav", 2.0, 16_000)
    columns = ("path", "id", "start", "end", "speaker", "split")
    listed: list[tuple[Any, ...]] = [
        ("in/long.wav", "first", 0.0, 2.5, "007", "train"),
        ("in/long.wav", None, 2.5, 4.0, "7", "validation"),
        ("in/long.wav", "rest", 9.25, None, "NA", None),
        (str(other), None, None, None, None, "train"),
        ("in/long.wav", "after", 10.0, None, "x", None),
        ("in/long.wav", "too far", 9.0, 10.5, "x", None),
        ("in/long.wav", "endless", 9.0, math.inf if kind != "jsonl" else 1e308, "x", None),
        ("in/long.wav", "backwards", 3.0, 2.0, "x", None),
        ("in/long.wav", "nothing", 3.0, 3.0, "x", None),
        ("in/long.wav", "negative", -1.0, 3.0, "x", None),
        ("in/gone.wav", "gone", None, None, "x", None),
    ]
    if kind != "jsonl":
        listed += [
            ("in/long.wav", "nan", math.nan, None, "x", None),
            ("in/long.wav", "nan 2", 0.0, math.nan, "x", None),
        ]
    path = manifest(tmp_path, kind, [dict(zip(columns, row, strict=True)) for row in listed])
    rows = {row["recording"]: row for row in planned(path, tmp_path / "work", "segment_length=60", "min_seconds=0.1")}
    assert len(rows) == len(listed)
    found = {
        id: [row[k] for k in ("first_frame", "frames", "group")] for id, row in rows.items() if row["status"] == OK
    }
    assert found == {
        "first": [0, 20_000, "007"],
        "in/long.wav#2.5-4.0": [20_000, 12_000, "7"],
        "rest": [74_000, 6_000, "NA"],
        str(other): [0, 32_000, str(other.parent)],
    }
    assert rows["first"]["split"] == rows[str(other)]["split"] == "train"
    assert rows["in/long.wav#2.5-4.0"]["split"] == "validation"
    assert rows["first"]["path"] == str(long)
    assert rows["gone"]["reason"] == "no such file"
    for id in ("after", "too far", "endless"):
        assert "is not inside its 10 s" in rows[id]["reason"]
    for id in {"backwards", "nothing", "negative", "nan", "nan 2"} & set(rows):
        assert "are not a stretch of time" in rows[id]["reason"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,id\na.wav,1\n", r"has no column named path; its columns are \['file', 'id'\]"),
        ("path,id\na.wav,1\nb.wav,1\n", "id '1' stands more than once"),
        ("path\na.wav\nb.wav\na.wav\n", "id 'a.wav' stands more than once"),
        ("path,id\na.wav,1\n,2\n", "row 2: path is empty"),
        ("path,split\na.wav,test\n", "row 1: split is 'test', expected one of train, validation"),
        (
            "path,start\na.wav, 1.5 \nb.wav,0:05\nc.wav,soon\n",
            r"row 2: start is '0:05', expected seconds",
        ),
        ("path\n", "has no rows"),
        ("", "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        find(tmp_path / "list.csv", None)


def test_other_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    for name, reason in (("a.txt", "neither a folder nor a manifest"), ("a.parquet", "cannot be read")):
        (tmp_path / name).write_text("path\na.wav\n")
        with pytest.raises(UserError, match=reason):
            find(tmp_path / name, None)
    (tmp_path / "a.jsonl").write_text('{"file": "a.wav"}\n')
    with pytest.raises(UserError, match=r"has no column named path; its columns are \['file'\]"):
        find(tmp_path / "a.jsonl", None)


def test_group_pattern(tmp_path: Path) -> None:
    for name in ("p225_001.wav", "p225_002.wav", "p226_001.wav"):
        (tmp_path / name).touch()
    assert find(tmp_path, r"^(p\d+)_")[0]["group"].to_pylist() == ["p225", "p225", "p226"]
    assert find(tmp_path, "(.*)")[0]["group"].to_pylist() == ["p225_001.wav", "p225_002.wav", "p226_001.wav"]
    for pattern in ("(p225)_", "p22", "(x)?p"):
        with pytest.raises(UserError, match=r"names no group in 'p22.*it needs one pair of parentheses that match"):
            find(tmp_path, pattern)
    with pytest.raises(UserError, match=r"group_pattern=\(p: missing \)"):
        find(tmp_path, "(p")
