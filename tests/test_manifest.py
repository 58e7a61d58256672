"""Lengths that a manifest states are taken at their word when planning, and compared with the files by stage 1."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline import measure
from pipeline.codes import shard_codes
from pipeline.manifest import read_manifest
from pipeline.plan import make_plan
from shards.contract import FAILED, OK, TOO_SHORT
from shards.errors import UserError
from shards.groups import group_finder
from tests.command_helpers import rows_of
from tests.helpers import codes_settings, speechlike


def write(folder: Path, rows: list[str], columns: str = "path,frames,rate,start,end") -> Path:
    (folder / "list.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder / "list.csv"


def row(path: Path, frames: int | None = None, rate: int | None = None, stretch: str = ",") -> str:
    info = soundfile.info(path)
    return f"{path},{frames or info.frames},{rate or info.samplerate},{stretch}"


def test_no_file_is_opened(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is the one that headers give, but for what only headers tell."""
    files = sorted(recordings.glob("*/*.wav"))
    with_frames = write(tmp_path, [row(path) for path in files])
    settings = codes_settings(with_frames, tmp_path / "a")
    monkeypatch.setattr(measure, "probe", lambda path: pytest.fail("a file was opened"))
    plan = make_plan(settings)
    monkeypatch.undo()
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in files))
    measured = make_plan(codes_settings(with_frames, tmp_path / "b"))
    told = ["channels", "file_bytes"]
    assert plan.shards == measured.shards
    for number in range(len(plan.shards)):
        assert plan.table(number).drop_columns(told).equals(measured.table(number).drop_columns(told))
        assert plan.table(number)["channels"].null_count == len(plan.table(number))


def test_codes_are_the_same_as_with_headers(recordings: Path, work: Path, tmp_path: Path) -> None:
    files = sorted(recordings.glob("*/*.wav"))
    columns = "path,id,frames,rate,start,end,speaker"
    rows = [f"{path},{path.relative_to(recordings)},{row(path).partition(',')[2]},{path.parent.name}" for path in files]
    shard_codes(codes_settings(write(tmp_path, rows, columns), tmp_path / "work"))
    expected = rows_of(work / "codes")
    assert rows_of(tmp_path / "work" / "codes") == expected


def test_a_manifest_that_is_wrong_costs_its_rows(recordings: Path, tmp_path: Path) -> None:
    a, b, c, d = sorted(recordings.glob("*/take_1.wav"))
    frames = soundfile.info(a).frames
    gone, text = tmp_path / "gone.wav", tmp_path / "text.wav"
    text.write_text("no audio")
    rows = [
        row(a, frames=frames + 1),
        row(b, rate=16_000),
        row(c),
        row(d),
        f"{gone},48000,48000,,",
        f"{text},48000,48000,,",
        f"{c},0,48000,0.1,",
        f"{d},48000,1,0.1,",
        row(d, stretch="1,2"),
        row(d, stretch="1,99"),
    ]
    shard_codes(codes_settings(write(tmp_path, rows), tmp_path / "work", "max_failed_fraction=0.95"))
    found = rows_of(tmp_path / "work" / "codes")
    reasons = {
        str(a): f"the file holds {frames} frames at 48000 Hz, its manifest says {frames + 1} at 48000 Hz",
        str(b): "frames at 44100 Hz, its manifest says",
        str(gone): "no such file",
        str(text): "not readable as audio",
        f"{c}#0.1-": "the manifest states 0 frames at 48000 Hz",
        f"{d}#0.1-": "the manifest states 48000 frames at 1 Hz",
        f"{d}#1-99.0": "is not inside its 3.2 s",
    }
    good = {str(c), str(d), f"{d}#1-2.0"}
    assert found.keys() == reasons.keys() | good
    for id, reason in reasons.items():
        assert FAILED in {r["status"] for r in found[id]} <= {FAILED, TOO_SHORT}, id
        assert all(reason in r["reason"] for r in found[id] if r["status"] == FAILED), found[id]
    assert all({r["status"] for r in found[id]} <= {OK, TOO_SHORT} for id in good)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("0.1,0.9,anna", "0.1,0.9,ben", "speaker"),
        ("0.1,0.9,anna", "0.2,0.9,anna", "start"),
        ("0.1,0.9,anna", "0.1,0.8,anna", "end"),
        ("0.1,0.9,anna", "0.1,,anna", "end"),
        ("take_1.wav", "take_0.wav", "path"),
        ("51200,16000", "51201,16000", "frames"),
        ("51200,16000", "51200,16001", "rate"),
        (",train", ",validation", "split"),
    ],
)
def test_a_manifest_that_changes_what_was_planned_is_refused(
    old: str, new: str, what: str, recordings: Path, tmp_path: Path
) -> None:
    *others, first = sorted(recordings.glob("*/take_1.wav"))
    columns = "id,path,frames,rate,start,end,speaker,split"
    rows = [f"{path.parent.name},{path},,,,,{path.parent.name}," for path in others]
    rows.insert(0, f"x,{first},51200,16000,0.1,0.9,anna,train")
    settings = codes_settings(write(tmp_path, rows, columns), tmp_path / "work")
    plan = make_plan(settings)
    write(tmp_path, [rows[0].replace(old, new), *rows[1:]], columns)
    with pytest.raises(UserError, match=rf"list.csv has another {what} for 'x' than .*plan.parquet"):
        make_plan(settings)
    write(tmp_path, [*rows[1:], rows[0]], columns)  # another order is nothing
    assert make_plan(settings).rows_sha256 == plan.rows_sha256


def test_recordings_that_a_manifest_names_no_more_stay_planned(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(path) for path in sorted(recordings.glob("*/take_0.wav"))]
    settings = codes_settings(write(tmp_path, rows), tmp_path / "work")
    plan = make_plan(settings)
    write(tmp_path, rows[1:])
    assert make_plan(settings).rows_sha256 == plan.rows_sha256
    assert "1 recordings of" in capsys.readouterr().out
    write(tmp_path, [row(recordings / "speaker_0" / "take_1.wav")])
    with pytest.raises(UserError, match=r"1 recordings such as .* were added"):
        make_plan(settings)
    assert f"{len(rows)} recordings of" in capsys.readouterr().out


def test_text_that_looks_like_a_time_stays_text(tmp_path: Path) -> None:
    """Arrow would make times of it; numbers become text as they are."""
    path = tmp_path / "list.jsonl"
    lines = [
        {"path": "2024-01-01", "id": "2024-01-01", "speaker": 7, "recorded": "2024-01-01", "start": 0.5},
        {"path": "b.wav", "id": "2024-01-02T10:00:00Z", "speaker": 8, "recorded": None, "start": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns, ignored = read_manifest(path)
    assert columns["recording"] == [line["id"] for line in lines]
    assert columns["path"] == [str(tmp_path / str(line["path"])) for line in lines]
    assert columns["group"] == ["7", "8"]
    assert columns["start"] == [0.5, 1.0]
    assert ignored == {"column recorded": 1}


def test_a_path_with_a_null_character_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"path": "a\\u0000b.wav"}\n{"path": "c.wav"}\n')
    columns, _ = read_manifest(path)
    assert columns["problem"] == ["its path holds a null character", None]


def test_what_other_columns_hold_is_nothing_to_us(tmp_path: Path) -> None:
    """As a recogniser writes them: of another type in each line, nested, in lines longer than a block of Arrow's."""
    lines = [
        {"path": "a.wav", "speaker": 7, "note": 1, "words": [1, {"x": None}, "x"], "start": 0.0004, "end": 2},
        {"path": "b.wav", "speaker": "anna", "note": "x", "words": {"a": [{"b": 1.5}] * 200_000}, "end": 3.5},
        {"path": "c.wav", "note": None, "id": 12345678901234567890123},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines))
    columns, ignored = read_manifest(path)
    assert columns["recording"] == ["a.wav#0.0004-2.0", "b.wav#0-3.5", "12345678901234567890123"]
    assert columns["group"] == ["7", "anna", None]
    assert columns["start"] == [0.0004, 0.0, 0.0]
    assert columns["end"] == [2.0, 3.5, None]
    assert ignored == {"column note": 1, "column words": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"path": "a.wav"}\n{"path": }\n', "line 2: Expecting value"),
        ('[{"path": "a.wav"}]', "line 1 is .*; each line is one object in UTF-8"),
        ('{"path": "a.wav", "path": "b.wav"}', "line 1: a column stands there more than once"),
        ('{"path": "a"}\n{"path": "b", "speaker": ["x"]}', r"row 2: speaker is \['x'\], expected text"),
        ('{"path": "a", "end": 1}\n{"path": "b", "end": true}', "row 2: end is 'true', expected seconds"),
        (
            '{"path": "a.wav", "frames": 1180591620717411303424, "rate": 8000}',
            "row 1: frames is '1180591620717411303424'",
        ),
        ('{"path": "\\ud800"}', "cannot be read"),
        (
            '{"path": "a", "end": 2}\n{"path": "b", "end": "0:05"}',
            "row 2: end is '0:05', expected seconds",
        ),
        ('{"path": "a.wav", "frames": 0.5, "rate": 8000}', "row 1: frames is 0.5, expected a whole number"),
        ('{"path": ' + "[" * 100_000, "line 1: maximum recursion depth"),
    ],
)
def test_lines_that_are_no_json_are_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_manifest(tmp_path / "list.jsonl")


def test_frames_without_a_rate_are_said_to_be_ignored(tmp_path: Path) -> None:
    columns, ignored = read_manifest(write(tmp_path, ["a.wav,9"], "path,frames"))
    assert (columns["frames"], ignored) == ([None], {"column frames, which says nothing without rate": 1})


@pytest.mark.parametrize("name", [" start", "Start"])
def test_a_column_that_is_nearly_ours_is_not_ignored(name: str, tmp_path: Path) -> None:
    """Else whole files would be taken for the stretches that are named."""
    with pytest.raises(UserError, match=f"its column '{name}' would be ignored: call it 'start', or something else"):
        read_manifest(write(tmp_path, ["a.wav,1"], f"path,{name}"))


def test_an_end_by_the_frames_of_an_mp3_is_the_files(tmp_path: Path) -> None:
    """They hold more than the recording: the encoder's delay, and what fills up the last one."""
    rate, path = 16_000, tmp_path / "a.mp3"
    soundfile.write(path, speechlike(3.337, rate, 0), rate)
    data = path.read_bytes()
    stated = data.index(b"Xing" if b"Xing" in data else b"Info") + 8
    counted = 576 * int.from_bytes(data[stated : stated + 4]) / rate
    assert counted - 3.337 > 0.05
    rows = [f"{path},1,{counted}", f"{path},0,1", f"{path},1,{counted + 0.1}"]
    plan = make_plan(codes_settings(write(tmp_path, rows, "path,start,end"), tmp_path / "work", "group_pattern=(.*)"))
    found = {row["recording"]: row for number in range(len(plan.shards)) for row in plan.rows(number)}
    frames = soundfile.info(path).frames
    assert found[f"{path}#1-{counted}"]["frames"] == frames - rate
    assert "is not inside its 3.337 s" in found[f"{path}#1-{counted + 0.1}"]["reason"]


def test_the_parent_of_a_link_is_that_of_its_end(tmp_path: Path) -> None:
    """As the system has it; by the letters of its path, another file would be taken."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "near" / "own").mkdir(parents=True)
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "deep")
    rows = ["link/../a.wav", "own/../a.wav", "../near/./own//b.wav", "link/c.wav"]
    columns, _ = read_manifest(write(tmp_path / "near", rows, "path"))
    expected = ["far/a.wav", "near/a.wav", "near/own/b.wav", "near/link/c.wav"]
    assert columns["path"] == [str(tmp_path / path) for path in expected]


def test_blanks_are_not_part_of_a_value(tmp_path: Path) -> None:
    """Else a speaker would be in both splits. Numbers as pandas writes them where one of their column is missing."""
    rows = ["a.wav,anna,train,44100.0,44100,", "b.wav, anna , train,44100.,44100.00, 1.0 ", "c.wav, , , ,, "]
    columns, _ = read_manifest(write(tmp_path, rows, "path,speaker,split,frames,rate,end"))
    assert columns["group"] == ["anna", "anna", ""]
    assert columns["split"] == ["train", "train", None]
    assert columns["frames"] == columns["rate"] == [44_100, 44_100, None]
    assert columns["end"] == [None, 1.0, None]
    (tmp_path / "list.jsonl").write_text('{"path": "a.wav", "end": ""}\n{"path": "b.wav", "end": "2.50"}\n')
    assert read_manifest(tmp_path / "list.jsonl")[0]["end"] == [None, 2.5]


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("start", True, "'true'"),
        ("frames", timedelta(seconds=5), r"datetime.timedelta\(seconds=5\)"),
        ("frames", datetime(2024, 1, 1), "'2024-01-01 00:00:00'"),
        ("end", [1.0], r"\[1.0\]"),
        ("speaker", ["x"], r"\['x'\]"),
    ],
)
def test_a_column_of_another_type_is_no_number(column: str, value: object, shown: str, tmp_path: Path) -> None:
    table = pa.table({"path": ["a.wav", "b.wav"], "frames": [None, 1], "rate": [None, 8000]})
    table = table.drop_columns([column] if column in table.column_names else [])
    pq.write_table(table.append_column(column, [[None, value]]), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=f"list.parquet cannot be read: row 2: {column} is {shown}, expected"):
        read_manifest(tmp_path / "list.parquet")
    empty = pa.nulls(2, pa.array([value]).type)
    pq.write_table(table.append_column(column, empty), tmp_path / "list.parquet")
    assert read_manifest(tmp_path / "list.parquet")[0]["problem"] == [None, None]


@pytest.mark.parametrize("text", ["path;start\na.wav;1\n", "path;start\na.wav;1,5\n", 'path,id\n"a.wav,x\nb.wav,y\n'])
def test_what_a_csv_is_like_is_said_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match="a CSV is UTF-8, with commas between its columns") as raised:
        read_manifest(tmp_path / "list.csv")
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_is_one_group_however_it_is_spelt() -> None:
    group_of = group_finder(None)
    assert {group_of(name) for name in ("a/x.wav", "./a/x.wav", "a//x.wav", "a/./x.wav")} == {"a"}
