"""Whatever the input: every file ends in a row with codes or a reason; what stops a command is one line."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipeline.codes import shard_codes
from pipeline.plan import make_plan
from shards.contract import FAILED, OK, TOO_SHORT
from tests.command_helpers import assert_one_line, in_process, refused, rows_of, stamps, without_settings
from tests.helpers import codes_settings, codes_words, run_command, speechlike, targets_words

RATE = 16_000
GOOD = [
    "plain/a.wav", "plain/.hidden.wav", "plain/two.dots..flac", "odd names/it's \"quoted\".wav",
    "odd names/$(x) `y`.wav", "odd names/line\nbreak.wav", "odd names/ÜBER – 声.FLAC", "folder.wav/inside.wav",
]  # fmt: skip
BAD = {
    "bad/empty.wav": (FAILED, "the file is empty"),
    "bad/no_audio.wav": (FAILED, "holds no audio"),
    "bad/text.wav": (FAILED, "not readable as audio"),
    "bad/cut.flac": (FAILED, "broken near|ends at frame"),
    "bad/cut.wav": (FAILED, "cut off: the header promises"),
    "bad/nan.wav": (FAILED, "NaN or infinity near 0.250 s"),
    "bad/slow.wav": (FAILED, "sample rate 4000 Hz is outside"),
    "bad/dangling.wav": (FAILED, "no such file"),
    "bad/one_sample.wav": (TOO_SHORT, "shorter than min_seconds"),
    "bad/caf\\xe9.wav": (FAILED, "not UTF-8"),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good recordings next to everything that is none."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, name in enumerate(GOOD):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, speechlike(0.5 + 0.2 * (seed % 4), RATE, seed), RATE)
    bad, audio = folder / "bad", speechlike(0.55, RATE, 99)
    bad.mkdir()
    (bad / "empty.wav").touch()
    (bad / "text.wav").write_text("no audio at all\n" * 100)
    (bad / "notes.txt").write_text("not to be read")
    (bad / "dangling.wav").symlink_to("nowhere")
    soundfile.write(bad / "no_audio.wav", audio[:0], RATE)
    soundfile.write(bad / "one_sample.wav", audio[:1], RATE)
    soundfile.write(bad / "slow.wav", audio, 4000)
    soundfile.write(os.fsencode(bad) + b"/caf\xe9.wav", audio, RATE, format="WAV")
    for name in ("cut.flac", "cut.wav"):
        soundfile.write(bad / name, audio, RATE)
        os.truncate(bad / name, (bad / name).stat().st_size // 2)
    soundfile.write(bad / "nan.wav", np.where(np.arange(len(audio)) == 4000, np.nan, audio), RATE, "FLOAT")
    return folder


@pytest.fixture(scope="module")
def outcome(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Both stages over `mixed`, refused first for too many failures, then run again; work folder, first output."""
    work = tmp_path_factory.mktemp("outcome") / "work"
    first = run_command("pipeline", *codes_words(mixed, work, "max_failed_fraction=0.01"))
    assert first.returncode == 1
    assert_one_line(first.stderr, "segments failed or were rejected, above max_failed_fraction=0.01; the rows say why")
    made = without_settings(stamps(work))
    assert in_process(codes_words(mixed, work, "max_failed_fraction=0.9")).exit_code == 0
    assert without_settings(stamps(work)) == made

    refused(targets_words(work, "max_failed_fraction=0.01"), "segments failed or were rejected, above")
    made = without_settings(stamps(work))
    assert not (work / "shards" / "index.parquet").exists()
    again = run_command("pipeline", *targets_words(work, "max_failed_fraction=0.9"))
    assert again.returncode == 0
    assert "error" not in again.stderr
    finished = without_settings(stamps(work))
    assert {name: finished[name] for name in made} == made
    assert finished.keys() - made.keys() == {"shards/index.parquet", "shards/SHA256SUMS"}
    assert in_process(["verify", f"shards={work / 'shards'}"]).exit_code == 0
    return work, first.stdout


@pytest.mark.parametrize("stage", ["codes", "shards"])
def test_every_file_ends_in_a_row_with_codes_or_a_reason(stage: str, outcome: tuple[Path, str]) -> None:
    rows = rows_of(outcome[0] / stage)
    assert rows.keys() == {*GOOD, *BAD}
    content = "codes" if stage == "codes" else "crc32"
    for name in GOOD:
        usable = [row for row in rows[name] if row["status"] == OK]
        assert usable, name
        assert all(row[content] and row["reason"] is None for row in usable)
        assert {row["status"] for row in rows[name]} <= {OK, TOO_SHORT}
    for name, (status, reason) in BAD.items():
        assert {row["status"] for row in rows[name]} == {status}, name
        assert all(re.search(reason, row["reason"]) and not row[content] for row in rows[name]), (name, rows[name])


def test_each_bad_file_is_named_before_there_is_an_index(mixed: Path, tmp_path: Path) -> None:
    """That is where a run ends with too many of them."""
    work = tmp_path / "work"
    assert in_process(codes_words(mixed, work, "max_failed_fraction=0.01")).exit_code == 1
    for rows, named in ((1000, len([fate for fate, _ in BAD.values() if fate == FAILED])), (2, 2), (0, 0)):
        found = in_process(["inspect", f"path={work}", f"rows={rows}"]).stdout
        assert len(re.findall(r"^  recording=bad/.*, status=failed, reason=\S", found, re.MULTILINE)) == named, found


def test_what_is_no_recording_by_its_name_is_counted(outcome: tuple[Path, str]) -> None:
    assert "ignored: 1 × .txt\n" in outcome[1]


def test_a_manifest_may_name_what_is_not_there(recordings: Path, tmp_path: Path) -> None:
    here = os.path.relpath(recordings, tmp_path)
    wanted = {
        f"{here}/speaker_0/take_1.wav,a,,": None, f"{here}/speaker_1/take_1.wav,b,0.1,0.8": None,
        "missing.wav,c,,": "no such file", f"{here}/speaker_2,c,,": "not readable as audio",
        f"{here}/speaker_2/take_1.wav,c,2,99": "is not inside its 2.4 s",
        f"{here}/speaker_3/take_1.wav,c,2,1": "not a stretch of time",
    }  # fmt: skip
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,speaker,start,end", *wanted]))
    words = codes_words(manifest, tmp_path / "work", "max_failed_fraction=0.9")
    assert in_process(words).exit_code == 0
    rows = rows_of(tmp_path / "work" / "codes")
    assert len(rows) == len(wanted)
    for line, reason in wanted.items():
        found = [row for name, some in rows.items() if name.split("#")[0] == line.split(",")[0] for row in some]
        assert {row["status"] for row in found} <= ({OK, TOO_SHORT} if reason is None else {FAILED}), line
        assert all(row["codes"] if row["status"] == OK else (reason or "") in row["reason"] for row in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,speaker\na.wav,b", "has no column named path; its columns are ['file', 'speaker']"),
        ("path,speaker\n,b", "row 1: path is empty"),
        ("path,split\na.wav,test", "row 1: split is 'test', expected one of train, validation"),
        ("path\na.wav\na.wav", "id 'a.wav' stands more than once"),
        ("path,start\na.wav,soon", "cannot be read"),
        ("", "cannot be read"),
        ("path\n", "has no rows"),
        (None, "no such folder or manifest"),
    ],
)
def test_a_wrong_manifest_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list.csv").write_text(content)
    refused(codes_words(tmp_path / "list.csv", tmp_path / "work"), message)
    assert not stamps(tmp_path / "work")


@pytest.mark.parametrize("below", ["", "/work"])
def test_a_work_folder_that_is_a_file_is_one_line(below: str, recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "line\nbreak").write_text("mine")
    refused(codes_words(recordings, Path(f"{tmp_path}/line\nbreak{below}")), "a file stands where a folder is")


def test_what_changes_after_planning_fails_with_a_reason(recordings: Path, tmp_path: Path) -> None:
    audio, work = shutil.copytree(recordings, tmp_path / "audio"), tmp_path / "work"
    make_plan(codes_settings(audio, work))
    reasons = {
        "speaker_0/take_1.wav": "No such file or directory since planning",
        "speaker_1/take_0.wav": "frames at ",
        "speaker_2/take_1.wav": "not readable as audio",
        "speaker_3/take_0.wav": "frames at 8000 Hz in 1 channels, planned were ",
    }
    gone, grown, garbled, faster = (audio / name for name in reasons)
    gone.unlink()
    soundfile.write(grown, np.pad(soundfile.read(grown)[0], (0, 8)), soundfile.info(grown).samplerate)
    garbled.write_bytes(b"x" * garbled.stat().st_size)
    soundfile.write(faster, soundfile.read(faster)[0], 8000, "FLOAT")
    assert in_process(codes_words(audio, work, "max_failed_fraction=0.99")).exit_code == 0
    assert_failed(rows_of(work / "codes"), reasons)


def test_what_is_deleted_after_encoding_fails_with_a_reason(recordings: Path, tmp_path: Path) -> None:
    audio, work = shutil.copytree(recordings, tmp_path / "audio"), tmp_path / "work"
    shard_codes(codes_settings(audio, work))
    (audio / "speaker_3" / "take_1.wav").unlink()
    refused(targets_words(work), "segments failed or were rejected")
    assert in_process(targets_words(work, "max_failed_fraction=0.99")).exit_code == 0
    assert_failed(rows_of(work / "shards"), {"speaker_3/take_1.wav": "No such file or directory since planning"})
    assert in_process(["verify", f"shards={work / 'shards'}"]).exit_code == 0


def assert_failed(rows: dict[str, list[dict[str, Any]]], reasons: dict[str, str]) -> None:
    """These recordings and no others."""
    assert len(rows) == 8
    for name, some in rows.items():
        found = {row["status"] for row in some if row["status"] != TOO_SHORT}
        assert found == {FAILED if name in reasons else OK}, name
        assert [row["reason"] for row in some if row["status"] == FAILED and reasons[name] not in row["reason"]] == []
