"""Recordings inside Parquet become tars of the same bytes, row for row: their codes are those of the files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from codec.audio import EXTENSIONS
from configs.loader import load_settings
from pipeline.codes import shard_codes
from pipeline.pack import pack_parquet
from pipeline.settings import PackParquetSettings
from pipeline.sources import find
from pipeline.tars import members
from shards.errors import UserError
from shards.storage import Location, Url
from tests.command_helpers import refused, rows_of
from tests.helpers import codes_settings, longest_file, speechlike
from tests.hub_server import Hub

HELD = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Held = dict[str, Any]


def write_parquet(path: Path, sounds: Sequence[Held | None], speakers: Sequence[Any]) -> Path:
    """In row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"audio": pa.array(sounds, HELD), "text": ["?"] * len(sounds), "speaker_id": pa.array(speakers)}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def dataset(recordings: Path, folder: Path) -> Path:
    """Recordings as a dataset of the hub: two files in its folder data, speakers by number."""
    files = sorted(recordings.glob("*/*.wav"))
    for number in range(2):
        sounds = [{"bytes": path.read_bytes(), "path": path.name} for path in files[number::2]]
        speakers = [int(path.parent.name.removeprefix("speaker_")) for path in files[number::2]]
        write_parquet(folder / "data" / f"train-{number}.parquet", sounds, speakers)
    return folder


def words(audio: Location, out: Path, *more: str) -> list[str]:
    return [f"audio={audio}", f"out={out}", *(more or ["speaker=speaker_id"])]


def pack(audio: Location, out: Path, *more: str) -> None:
    pack_parquet(load_settings(PackParquetSettings, "pack_parquet.json", words(audio, out, *more)))


def contents(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {info.name: opened.extractfile(info).read() for info in opened}  # type: ignore[union-attr]


def codes(work: Path) -> list[Any]:
    """Of all segments, in whichever shard they are."""
    rows = (row for rows in rows_of(work / "codes").values() for row in rows)
    return sorted([row["status"], row["segment"], row["codes"] or []] for row in rows)


def test_parquet_holds_what_files_hold(recordings: Path, work: Path, tmp_path: Path) -> None:
    pack(dataset(recordings, tmp_path / "dataset"), tmp_path / "tars")
    shard_codes(codes_settings(tmp_path / "tars", tmp_path / "work"))
    assert codes(tmp_path / "work") == codes(work)
    found, ignored = find(tmp_path / "tars", None)
    assert not ignored
    files = {path.read_bytes(): path for path in recordings.glob("*/*.wav")}
    for row in found.to_pylist():
        _, row_number = row["recording"].split(".tar/")
        content = contents(Path(row["path"]))[row_number]
        assert files.pop(content).parent.name == f"speaker_{row['group']}"
    assert not files


def test_no_row_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no name, no audio or no speaker; what is no audio gets its reason."""
    flac = io.BytesIO()
    soundfile.write(flac, speechlike(1, 16_000, 0), 16_000, format="FLAC")
    sounds: list[Held | None] = [
        {"bytes": flac.getvalue(), "path": "voice/a.FLAC"},
        {"bytes": flac.getvalue(), "path": None},
        {"bytes": b"not audio", "path": "b.m4a"},
        {"bytes": None, "path": "c.mp3"},
        None,
    ]
    path = write_parquet(tmp_path / "voices.parquet", sounds, ["anna", None, "bo", "bo", ""])
    pack(path, tmp_path / "tars")
    names = ["000000.flac", "000001.flac", "000002.wav", "000003.mp3", "000004.wav"]
    recordings = {member.name: member for member in members(tmp_path / "tars" / "voices.tar", EXTENSIONS)}
    assert list(recordings) == names
    assert [recordings[name].speaker for name in names] == ["anna", None, "bo", "bo", None]
    held = contents(tmp_path / "tars" / "voices.tar")
    assert [held[name] for name in names] == [flac.getvalue(), flac.getvalue(), b"not audio", b"", b""]
    assert "speaker_id is empty in 2 of 5 rows" in capsys.readouterr().out
    shard_codes(codes_settings(tmp_path / "tars", tmp_path / "work", "max_failed_fraction=1"))
    rows = [row for rows in rows_of(tmp_path / "work" / "codes").values() for row in rows]
    assert len({row["recording"] for row in rows}) == len(names)
    reasons = {row["recording"].rpartition("/")[2]: row["reason"] for row in rows}
    assert [reasons[name] is None for name in names] == [True, True, False, False, False]


def test_bytes_without_names_and_voices_without_speakers(recordings: Path, tmp_path: Path) -> None:
    sounds = [path.read_bytes() for path in sorted(recordings.glob("*/*.wav"))]
    pq.write_table(pa.table({"sound": pa.array(sounds, pa.large_binary())}), tmp_path / "a.parquet")
    pack(tmp_path / "a.parquet", tmp_path / "tars", "speaker=none", "column=sound")
    held = contents(tmp_path / "tars" / "a.tar")
    assert [data for name, data in held.items() if name.endswith(".wav")] == sounds
    assert find(tmp_path / "tars", None)[0]["group"].to_pylist() == ["a.tar"] * len(sounds)


def test_from_the_hub_come_the_same_bytes(recordings: Path, hub: Hub, tmp_path: Path) -> None:
    audio = dataset(recordings, tmp_path / "dataset")
    hub.holds("datasets/me/voices", audio)
    pack(audio, tmp_path / "here")
    pack(Url("hf://datasets/me/voices"), tmp_path / "there")
    tars = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.tar")]
    assert {str(tar) for tar in tars} == {"data/train-0.tar", "data/train-1.tar"}
    for tar in tars:
        assert (tmp_path / "there" / tar).read_bytes() == (tmp_path / "here" / tar).read_bytes()


def test_what_is_not_packed_is_said(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = dataset(recordings, tmp_path / "dataset")
    (audio / "data" / "train-1.parquet").rename(audio / "data" / "TRAIN.PARQUET")
    (audio / "README.md").touch()
    (audio / "a.wav").touch()
    pack(audio, tmp_path / "tars")
    assert {path.name for path in (tmp_path / "tars" / "data").iterdir()} == {"train-0.tar", "TRAIN.tar"}
    ignored, _ = capsys.readouterr().out.splitlines()
    assert sorted(ignored.removeprefix("ignored: ").split(", ")) == ["1 × .md", "1 × .wav"]
    (audio / "data" / "train-0.parquet").rename(audio / "data" / "TRAIN.parquet")
    with pytest.raises(UserError, match="two names differ only in"):
        pack(audio, tmp_path / "again")


def test_what_stands_is_kept_and_what_is_missing_is_made(recordings: Path, tmp_path: Path) -> None:
    audio, tars = dataset(recordings, tmp_path / "dataset"), tmp_path / "tars"
    pack(audio, tars)
    first, second = sorted(tars.rglob("*.tar"))
    before = second.read_bytes()
    first.write_bytes(b"as it is")
    second.unlink()
    pack(audio, tars)
    assert first.read_bytes() == b"as it is"
    assert second.read_bytes() == before


def test_links_to_folders_are_followed_and_none_to_nowhere_is_left_out(recordings: Path, tmp_path: Path) -> None:
    audio = dataset(recordings, tmp_path / "dataset")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "voices.parquet").symlink_to(audio, target_is_directory=True)
    (linked / "around").symlink_to(linked, target_is_directory=True)
    pack(linked, tmp_path / "tars")
    tars = {str(tar.relative_to(tmp_path / "tars")) for tar in (tmp_path / "tars").rglob("*.tar")}
    assert tars == {"voices.parquet/data/train-0.tar", "voices.parquet/data/train-1.tar"}
    (linked / "away.parquet").symlink_to(tmp_path / "not mounted")
    with pytest.raises(FileNotFoundError, match=r"away\.parquet"):
        pack(linked, tmp_path / "others")


def test_what_polars_writes_is_read(recordings: Path, tmp_path: Path) -> None:
    """Views; and a speaker that no row of a file has."""
    sounds = [path.read_bytes() for path in sorted(recordings.glob("*/*.wav"))[:2]]
    views = pa.array(sounds, pa.binary_view())
    for name, speakers in (("named", pa.array(["anna", "bo"], pa.string_view())), ("of_nobody", pa.nulls(2))):
        path = tmp_path / "in" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"audio": views, "speaker_id": speakers}), path)
    pack(tmp_path / "in", tmp_path / "tars")
    for name, speakers in (("named", ["anna", "bo"]), ("of_nobody", [None, None])):
        held = members(tmp_path / "tars" / f"{name}.tar", EXTENSIONS)
        assert [member.speaker for member in held] == speakers
        contained = contents(tmp_path / "tars" / f"{name}.tar")
        assert [contained[f"00000{row}.wav"] for row in range(2)] == sounds


def test_on_a_full_disk_nothing_is_written_behind_its_end(recordings: Path, tmp_path: Path) -> None:
    """By what had begun to write, when it is thrown away: Python would show a second error."""
    audio = dataset(recordings, tmp_path / "dataset")
    with pytest.raises(OSError, match=r"File too large: .*train-0\.tar"), longest_file(1 << 16):
        pack(audio, tmp_path / "tars")
    assert not [*(tmp_path / "tars").rglob("*.*")]


def test_a_damaged_file_leaves_no_tar(recordings: Path, tmp_path: Path) -> None:
    """Its last row group can be read no more."""
    path = dataset(recordings, tmp_path / "dataset") / "data" / "train-0.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-0\.parquet cannot be read: "):
        pack(path, tmp_path / "tars")
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["speaker=who"], "a.parquet has no speaker=who; its columns are audio, text, speaker_id, when"),
        (
            ["speaker=none", "column=sound"],
            "a.parquet has no column=sound; its columns are audio, text, speaker_id, when",
        ),
        (["speaker=none", "column=text"], "its column text is string; expected bytes, or a struct of bytes and path"),
        (["speaker=when"], "its column when is double; expected text or whole numbers"),
    ],
)
def test_wrong_columns_are_named(more: list[str], message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"bytes": b"a", "path": "a.wav"}], ["anna"])
    pq.write_table(pq.ParquetFile(path).read().append_column("when", pa.array([0.5])), path)
    refused(["pack-parquet", *words(path, tmp_path / "tars", *more)], message)
    assert not (tmp_path / "tars").exists()


def test_what_holds_no_recordings(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [{"bytes": None, "path": "/data/a.wav"}], ["anna"])
    message = (
        "a.parquet: its column audio holds no audio, only names such as '/data/a.wav': list these files in a manifest"
    )
    refused(["pack-parquet", *words(tmp_path / "in", tmp_path / "tars")], message)
    assert not [*(tmp_path / "tars").iterdir()]
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 and so on")
    refused(["pack-parquet", *words(tmp_path / "in", tmp_path / "tars")], "a.parquet cannot be read: ")
    refused(
        ["pack-parquet", *words(tmp_path / "tars", tmp_path / "out")], "is no Parquet file, and no folder with such"
    )


def test_who_gives_parquet_to_stage_1_learns_the_way(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "in" / "a.parquet", [{"bytes": b"a", "path": "a.wav"}], ["anna"])
    for audio in (path, path.parent):
        with pytest.raises(UserError, match=r"recordings inside Parquet go through `just pack-parquet` first"):
            find(audio, None)
