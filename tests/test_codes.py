"""Tokens in shards are those of `SNAC.encode` on the whole recording, token for token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import soundfile
from snac import SNAC

from codec.audio import Recording, probe
from pipeline.codes import codes_path, encode_shard, read_windows, shard_codes
from pipeline.plan import Plan
from shards.contract import (
    COARSE_24K,
    CONTEXT_COARSE,
    FAILED,
    OK,
    PLAN_NAME,
    TOO_SHORT,
    sample_key,
    unflatten_codes,
)
from tests.helpers import codes_settings
from tests.test_snac import tokens_of, write_all

Tokens = npt.NDArray[np.int16]
WINDOW = 12  # coarse tokens in window_seconds=1


def rows_of(work: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Plan row and codes row of every segment."""
    plan = Plan(work / PLAN_NAME)
    for number, shard in enumerate(plan.shards):
        yield from zip(plan.rows(number), pq.read_table(codes_path(work, *shard)).to_pylist(), strict=True)


def check(work: Path, model: SNAC) -> int:
    """Every segment holds its own tokens between its neighbours'; returns how many were looked at."""
    expected = {row["path"]: tokens_of(model, Path(row["path"])) for row, _ in rows_of(work)}
    checked = 0
    for row, found in rows_of(work):
        assert found["key"] == sample_key(row["shard"], row["row"])
        assert [found[name] for name in ("recording", "segment", "status", "n_coarse")] == [
            row[name] for name in ("recording", "segment", "status", "n_coarse")
        ]
        if row["status"] != OK:
            assert found["codes"] is None
            continue
        whole, start, stop = expected[row["path"]], row["start_coarse"], row["start_coarse"] + row["n_coarse"]
        before, after = min(CONTEXT_COARSE, start), min(CONTEXT_COARSE, len(whole) - stop)
        assert (found["context_before"], found["context_after"]) == (before, after)
        codes = unflatten_codes(np.asarray(found["codes"], np.int16))
        assert np.array_equal(codes, whole[start - before : stop + after]), (row["recording"], row["segment"])
        checked += 1
    return checked


@pytest.mark.parametrize(("rate", "same"), [(24_000, 2), (44_100, 1)])
def test_tokens_are_those_of_the_whole(rate: int, same: int, snac: SNAC, tmp_path: Path) -> None:
    coarse = COARSE_24K * rate / 24_000
    ends = [1, 1.0005, WINDOW, WINDOW + 0.001, 2 * WINDOW + 2.3]
    frames = [1, 9_001, *(round(end * coarse) for end in ends)]
    write_all(tmp_path / "audio", frames, rate, same)
    small = ["min_seconds=0", "window_seconds=1", "batch_seconds=4", "segments_per_shard=1000", "segment_length=0.5"]
    shard_codes(codes_settings(tmp_path / "audio", tmp_path / "work", *small))
    assert check(tmp_path / "work", snac) > 10 * same


def test_a_recording_in_several_shards_keeps_its_tokens(snac: SNAC, tmp_path: Path) -> None:
    write_all(tmp_path / "audio", [30_003, 110_000], 44_100)
    small = ["min_seconds=0.1", "window_seconds=1", "batch_seconds=1", "segments_per_shard=2"]
    shard_codes(codes_settings(tmp_path / "audio", tmp_path / "work", *small))
    rows = [row for row, _ in rows_of(tmp_path / "work")]
    shards = {(row["split"], row["shard"]) for row in rows if row["recording"] == "voice_1/a.wav"}
    assert len(shards) >= 2
    assert check(tmp_path / "work", snac) == len(rows) - sum(row["status"] == TOO_SHORT for row in rows)


def test_tokens_of_the_work_folder(work: Path, snac: SNAC) -> None:
    assert check(work, snac) >= 20
    assert {found["context_before"] for _, found in rows_of(work)} >= {0, CONTEXT_COARSE}
    assert {found["context_after"] for _, found in rows_of(work)} >= {0, CONTEXT_COARSE}


def test_tokens_vary(work: Path) -> None:
    """Equal tokens would prove nothing if they were all the same."""
    tokens = np.concatenate([found["codes"] for _, found in rows_of(work) if found["codes"]])
    assert len(np.unique(tokens)) > 50


def test_bad_recordings_fail_alone(recordings: Path, snac: SNAC, tmp_path: Path) -> None:
    shutil.copytree(recordings, tmp_path / "audio")
    (tmp_path / "audio" / "speaker_0" / "empty.wav").touch()
    settings = codes_settings(tmp_path / "audio", tmp_path / "work", "window_seconds=1", "max_failed_fraction=0.5")
    shard_codes(settings)
    plan = Plan(tmp_path / "work" / PLAN_NAME)
    rows = [row for number in range(len(plan.shards)) for row in plan.rows(number)]
    damaged = tmp_path / "audio" / "speaker_3" / "take_1.wav"
    audio, rate = soundfile.read(damaged, dtype="float32")
    audio[-1000:] = np.nan
    soundfile.write(damaged, audio, rate, "FLOAT")
    (tmp_path / "audio" / "speaker_2" / "take_0.wav").unlink()
    longer = tmp_path / "audio" / "speaker_1" / "take_1.wav"
    audio, rate = soundfile.read(longer, dtype="float32")
    soundfile.write(longer, np.append(audio, audio[:1], axis=0), rate, "FLOAT")
    reasons = {
        "speaker_0/empty.wav": "the file is empty",
        "speaker_1/take_1.wav": "frames at ",
        "speaker_2/take_0.wav": "No such file or directory since planning",
        "speaker_3/take_1.wav": "NaN or infinity near",
    }
    found = encode_shard(rows, snac, settings)
    before = {(row["recording"], row["segment"]): row for _, row in rows_of(tmp_path / "work")}
    assert len(found) == len(rows) == len(before)
    for row in found:
        if row["recording"] in reasons and before[row["recording"], row["segment"]]["status"] != TOO_SHORT:
            assert row["status"] == FAILED
            assert reasons[row["recording"]] in row["reason"]
            assert "codes" not in row
        elif row["status"] == OK:
            assert row["codes"].tolist() == before[row["recording"], row["segment"]]["codes"]
    assert {row["recording"] for row in found if row["status"] == FAILED} == set(reasons)


def test_only_the_windows_of_the_segments_are_read(recordings: Path) -> None:
    path = recordings / "speaker_3" / "take_1.wav"
    recording = Recording(path, probe(path))

    def starts(row: dict[str, Any], window_coarse: int = WINDOW) -> list[int]:
        return [window.start for window, _ in read_windows(recording, [{**row, "n_coarse": 4}], window_coarse)]

    assert starts({"start_coarse": 17}) == [12]
    assert starts({"start_coarse": 14}) == [0, 12]
    assert starts({"start_coarse": 0}, 5) == [0, 5]
