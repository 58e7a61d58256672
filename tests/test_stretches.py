"""Stretches of one file are those of the file decoded whole and cut; reading them in order decodes it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from snac import SNAC

from codec import audio
from codec.audio import BLOCK_FRAMES, DECODERS, AudioError, File, Header, Recording, Samples, probe
from pipeline import measure
from pipeline.calibrate import choose
from pipeline.codes import encode_shard, shard_codes
from pipeline.plan import Plan, make_plan
from pipeline.settings import CodesSettings
from pipeline.splits import hashed
from pipeline.targets import shard_targets
from pipeline.teachers import Taught, Teacher
from shards.contract import OK, PLAN_NAME, Row
from tests.command_helpers import rows_of
from tests.helpers import codes_settings, speechlike, targets_settings
from tests.test_tars import write_tars
from tests.test_teachers import Upsampling

Counted = Callable[[], int]

RATE = 24_000
SECONDS = 10
FORWARD = {"mp3": ("MP3", "MPEG_LAYER_III"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}
FORMATS = {**FORWARD, "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "FLOAT")}


def write(path: Path, seed: int = 0, channels: int = 2) -> Path:
    voices = [speechlike(SECONDS, RATE, seed + channel) for channel in range(channels)]
    format, subtype = FORMATS[path.suffix[1:]]
    soundfile.write(path, np.stack(voices, axis=1), RATE, subtype, format=format)
    return path


def decoded(path: Path) -> Samples:
    """In one read: soundfile seeks after each."""
    with soundfile.SoundFile(path) as file:
        whole = file.read(dtype="float32", always_2d=True)
    return whole.mean(axis=1, dtype=np.float64).astype(np.float32)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """How many frames were decoded since it was asked last."""
    read, frames = audio._read, list[int]()

    def counting(file: soundfile.SoundFile, position: int, n: int) -> Any:
        frames.append(n)
        return read(file, position, n)

    def taken() -> int:
        total = sum(frames)
        frames.clear()
        return total

    monkeypatch.setattr(audio, "_read", counting)
    return taken


def cuts(frames: int) -> list[tuple[int, int]]:
    """Stretches in order of their start: with gaps, side by side, one inside the other, overlapping, to the end."""
    edges = np.linspace(0, frames, 13).astype(int).tolist()
    return [
        (edges[0] + 7, edges[1]),
        (edges[1], edges[2]),
        (edges[3], edges[6]),
        (edges[4], edges[5]),
        (edges[5] - 1, edges[7]),
        (edges[9], edges[9] + 1),
        (edges[9] + 1, edges[10]),
        (edges[11], frames),
    ]


@pytest.mark.parametrize("extension", FORMATS)
def test_stretches_in_order_are_cut_from_the_whole(extension: str, tmp_path: Path, counted: Counted) -> None:
    """Each of them twice from its start, and once from its middle."""
    path = write(tmp_path / f"a.{extension}")
    header, whole = probe(path), decoded(path)
    file = File(path, header)
    for first, end in cuts(header.frames):
        recording = Recording(path, header, first, end - first, file)
        for start in (0, 0, (end - first) // 2):
            assert np.array_equal(np.concatenate(list(recording.blocks(start))), whole[first + start : end])
    assert counted() <= header.frames


@pytest.mark.parametrize("extension", FORMATS)
def test_stretches_in_any_order_are_cut_from_the_whole(extension: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{extension}")
    header, whole = probe(path), decoded(path)
    file = File(path, header)
    for first, end in np.random.default_rng(0).permutation(cuts(header.frames)).tolist():
        recording = Recording(path, header, first, end - first, file)
        assert np.array_equal(np.concatenate(list(recording.blocks())), whole[first:end])


@pytest.mark.parametrize("extension", FORWARD)
def test_long_stretches_are_decoded_once_for_each_reader(
    extension: str, tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One surveys, two others come after it, the second further behind than what is kept."""
    monkeypatch.setattr(audio, "MAX_HELD_FRAMES", BLOCK_FRAMES)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", BLOCK_FRAMES // 16)
    path = write(tmp_path / f"a.{extension}")
    header, whole = probe(path), decoded(path)
    file, third = File(path, header), header.frames // 3
    assert third > BLOCK_FRAMES
    for first in (0, third, 2 * third):
        recording = Recording(path, header, first, third, file)
        surveyed, heard = list(recording.blocks()), list(recording.blocks())
        for pieces in (surveyed, heard, list(recording.blocks())):
            assert np.array_equal(np.concatenate(pieces), whole[first : first + third])
        assert all(sum(map(len, decoder._kept)) <= BLOCK_FRAMES for decoder in file._decoders)
    assert counted() <= DECODERS * header.frames


def test_what_follows_a_broken_place_fails_at_once(tmp_path: Path, counted: Counted) -> None:
    path = write(tmp_path / "a.mp3")
    header, whole = probe(path), decoded(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    file, second, reasons = File(path, header), header.rate, set[str]()
    for first in range(0, header.frames - second, second):
        recording = Recording(path, header, first, second, file)
        try:
            assert np.array_equal(np.concatenate(list(recording.blocks())), whole[first : first + second])
        except AudioError as error:
            reasons.add(str(error))
    (reason,) = reasons
    assert "its header says 240000" in reason
    assert counted() <= header.frames


@pytest.mark.parametrize("format", ["WAV", "CAF"])
def test_a_stretch_that_is_not_finite_costs_no_other(format: str, tmp_path: Path) -> None:
    """Also in a format that goes only forward."""
    path, stereo = tmp_path / "a.wav", np.stack([speechlike(3, RATE, 0)] * 2, axis=1)
    stereo[RATE + 5] = np.inf, -np.inf
    soundfile.write(path, stereo, RATE, "FLOAT", format=format)
    header = probe(path)
    file = File(path, header)
    before, bad, after = (Recording(path, header, second * RATE, RATE, file) for second in range(3))
    assert np.array_equal(next(before.blocks()), stereo[:RATE, 0])
    with pytest.raises(AudioError, match=r"NaN or infinity near 1\.000 s"):
        next(bad.blocks())
    assert np.array_equal(next(after.blocks()), stereo[2 * RATE :, 0])


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A manifest that names twelve stretches of each of four files in no order, nor in that of ids, and two whole."""
    lines = []
    for number, extension in enumerate([*FORWARD, "flac"]):
        write(tmp_path / f"long_{number}.{extension}", seed=10 * number, channels=1)
        lines += [
            f"long_{number}.{extension},{0.8 * n:.1f},{0.8 * n + 1.1:.1f},{number},{7 * n % 12} {number}"
            for n in range(12)
        ]
    for number in range(2):
        soundfile.write(tmp_path / f"short_{number}.wav", speechlike(1, RATE, number), RATE)
        lines.append(f"short_{number}.wav,,,short {number},{number}")
    shuffled = np.random.default_rng(0).permutation(lines).tolist()
    (tmp_path / "list.csv").write_text("\n".join(["path,start,end,speaker,id", *shuffled]) + "\n")
    return tmp_path / "list.csv"


def settings_of(listed: Path) -> CodesSettings:
    return codes_settings(listed, listed.parent / "work", "segments_per_shard=1000")


def planned(plan: Plan) -> Iterator[list[Row]]:
    return (plan.rows(number) for number in range(len(plan.shards)))


def test_stretches_stand_together_and_each_header_is_read_once(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[str]()

    def probing(path: Path) -> Header:
        opened.append(path.name)
        return probe(path)

    monkeypatch.setattr(measure, "probe", probing)
    for rows in planned(make_plan(settings_of(listed))):
        recordings = list({row["recording"]: row for row in rows}.values())
        files = list(dict.fromkeys(row["path"] for row in recordings))
        assert [row["path"] for row in recordings] == [p for p in files for row in recordings if row["path"] == p]
        for path in files:
            firsts = [row for row in recordings if row["path"] == path]
            assert firsts == sorted(firsts, key=lambda row: row["first_frame"])
        begins = [next(row["recording"] for row in recordings if row["path"] == path) for path in files]
        assert begins == sorted(begins, key=lambda id: hashed(id, 0))
    assert sorted(opened) == sorted(path.name for path in listed.parent.glob("*_*.*"))


def test_calibration_takes_stretches_of_different_files(listed: Path) -> None:
    assert len({row["path"] for row in choose(make_plan(settings_of(listed)), 5)}) == 5
    more = choose(Plan(listed.parent / "work" / PLAN_NAME), 9)
    assert len({row["recording"] for row in more}) == 9
    assert len({row["path"] for row in more}) == 6


def test_recordings_with_files_of_their_own_keep_their_order(recordings: Path, tmp_path: Path) -> None:
    """So a plan of them is the one that it was, what cannot be used is in it by its own id too, and tars are mixed."""
    for place in (recordings, write_tars(recordings, tmp_path / "tars")):
        for rows in planned(make_plan(codes_settings(place, tmp_path / f"of {place.name}", "seed=3"))):
            ids = list(dict.fromkeys(row["recording"] for row in rows))
            assert ids == sorted(ids, key=lambda id: hashed(id, 3))


def test_a_pass_decodes_each_file_once(listed: Path, counted: Counted) -> None:
    work, frames = listed.parent / "work", (3 * SECONDS + 12 * 1.1 + 2) * RATE  # FLAC: each stretch for itself
    shard_codes(settings_of(listed))
    assert counted() <= frames
    shard_targets(targets_settings(work))
    assert counted() <= frames
    assert {row["status"] for row in pq.read_table(work / "shards" / "index.parquet").to_pylist()} <= {OK, "too_short"}


def test_codes_are_those_of_each_stretch_alone(listed: Path, snac: SNAC) -> None:
    """Whatever order a plan has them in: one that stands has another."""
    settings = settings_of(listed)
    shard_codes(settings)
    of_recordings = rows_of(listed.parent / "work" / "codes")
    found = {(id, row["segment"]): row for id, rows in of_recordings.items() for row in rows}
    for rows in planned(Plan(listed.parent / "work" / PLAN_NAME)):
        by_recording = [[row for row in rows if row["recording"] == id] for id in {row["recording"] for row in rows}]
        for together in (*by_recording, [row for own in by_recording for row in own]):
            for row in encode_shard([dict(row) for row in together], snac, settings):
                expected = found[row["recording"], row["segment"]]
                assert row["status"] == expected["status"]
                assert [*row.get("codes", [])] == (expected["codes"] or [])
                assert row.get("content_crc32") == expected["content_crc32"]


@pytest.mark.parametrize("teacher", ["recording", "sidon", "auto"])
def test_targets_are_those_of_each_stretch_alone(teacher: str, listed: Path, counted: Counted) -> None:
    plan = make_plan(settings_of(listed))
    settings = targets_settings(listed.parent / "work", f"teacher={teacher}")
    ours = Teacher(settings, Upsampling())  # type: ignore[arg-type]
    for rows in planned(plan):
        recordings = [[row] for row in rows if row["status"] == OK and row["segment"] == 0]
        counted()
        together = list(ours.segments(recordings))
        assert counted() <= sum({rows[0]["path"]: rows[0]["file_frames"] * 1.4 for rows in recordings}.values())
        for own, found in zip(recordings, together, strict=True):
            (alone,) = ours.segments([own])
            assert isinstance(found, Taught)
            assert isinstance(alone, Taught)
            assert found.gain == alone.gain
            assert np.array_equal(found.target, alone.target)
