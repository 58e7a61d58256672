"""Stage 2 takes nothing on trust: codes are checked, clipped targets rejected, failures tried again when asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.codes import shard_codes
from pipeline.plan import Plan, make_plan
from pipeline.targets import shard_targets
from shards.contract import PLAN_NAME
from shards.errors import ShardError, UserError, printable
from shards.writer import read_metadata, write_table
from tests.helpers import codes_settings, speechlike, targets_settings


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    for seed, voice in enumerate(("anna", "ben", "carl")):
        (tmp_path / "audio" / voice).mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / voice / "a.wav", speechlike(1.0, 24_000, seed), 24_000)
    return tmp_path / "audio"


def rows(work: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((work / "shards").glob("*/*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_what_could_not_be_planned_is_for_the_stage_that_plans(audio: Path, tmp_path: Path) -> None:
    (audio / "anna" / "a.wav").write_text("no audio")
    with pytest.raises(UserError, match="raise max_failed_fraction, or mend what could not even be planned and"):
        shard_codes(codes_settings(audio, tmp_path / "work", "max_failed_fraction=0"))


def test_failures_are_tried_again_when_asked(audio: Path, tmp_path: Path) -> None:
    work, away = tmp_path / "work", audio / "anna" / "a.away"
    shard_codes(codes_settings(audio, work))
    shutil.move(audio / "anna" / "a.wav", away)
    with pytest.raises(UserError, match="mend the recordings and add retry=failed"):
        shard_targets(targets_settings(work))
    assert {row["status"] for row in rows(work) if row["group"] == "anna"} == {"failed"}
    shutil.move(away, audio / "anna" / "a.wav")
    with pytest.raises(UserError, match="failed or were rejected"):
        shard_targets(targets_settings(work))
    shard_targets(targets_settings(work, "retry=failed"))
    assert {row["status"] for row in rows(work)} <= {"ok", "too_short"}
    assert (work / "shards" / "index.parquet").exists()


def test_segments_that_stage_1_mended_get_their_targets(audio: Path, tmp_path: Path) -> None:
    """Without being asked: the shard was made when there were no codes."""
    work, away, some = tmp_path / "work", audio / "anna" / "a.away", "max_failed_fraction=1"
    make_plan(codes_settings(audio, work))
    shutil.move(audio / "anna" / "a.wav", away)
    shard_codes(codes_settings(audio, work, some))
    shard_targets(targets_settings(work, some))
    assert {row["status"] for row in rows(work) if row["group"] == "anna"} == {"failed"}
    shutil.move(away, audio / "anna" / "a.wav")
    shard_codes(codes_settings(audio, work, "retry=failed"))
    shard_targets(targets_settings(work))
    assert {row["status"] for row in rows(work)} <= {"ok", "too_short"}


def test_a_recording_in_both_splits_is_said(audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups keep voices apart, but not copies of a file under two of them. Silence is no copy."""
    for voice in ("anna", "ben", "carl"):
        soundfile.write(audio / voice / "silence.wav", np.zeros(24_000), 24_000)
    shard_codes(codes_settings(audio, tmp_path / "apart"))
    shard_targets(targets_settings(tmp_path / "apart"))
    assert "in training too" not in capsys.readouterr().out
    for voice in ("anna", "ben", "carl"):
        soundfile.write(audio / voice / "\x1bcopy.wav", speechlike(1.0, 24_000, 9), 24_000)
    shard_codes(codes_settings(audio, tmp_path / "work"))
    shard_targets(targets_settings(tmp_path / "work"))
    index = pq.read_table(tmp_path / "work" / "shards" / "index.parquet").to_pylist()
    judged = [row["recording"] for row in index if (row["split"], row["status"]) == ("validation", "ok")]
    copies, sounding = ([name for name in judged if name.endswith(end)] for end in ("copy.wav", ("copy.wav", "a.wav")))
    assert (
        f"warning: {len(copies)} of {len(sounding)} validation segments are in training too, under another group, such "
        f"as {printable(min(copies))}: put its copies into one group, or remove them"
    ) in capsys.readouterr().out


def test_targets_beyond_full_scale_are_rejected(audio: Path, tmp_path: Path) -> None:
    loud = (speechlike(1.0, 24_000, 7) * 2**15).astype(np.float32)  # floats that count in 16 bit steps
    soundfile.write(audio / "ben" / "a.wav", loud, 24_000, "FLOAT")
    shard_codes(codes_settings(audio, tmp_path / "work"))
    shard_targets(targets_settings(tmp_path / "work", "max_failed_fraction=1"))
    ben = [row for row in rows(tmp_path / "work") if row["group"] == "ben"]
    assert {(row["status"], row["reason"]) for row in ben} == {
        ("rejected", "more than max_clipped_fraction=0.01 of it lies at or beyond full scale")
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.slice(1), "rows of codes for"),
        (lambda table: table.take(list(range(len(table)))[::-1]), "the plan says"),
        (lambda table: table.set_column(0, "key", table["key"][::-1]), "planned is"),
        (lambda table: with_codes(table, lambda codes: [5000, *codes[1:]]), "tokens run from .* to 5000"),
        (lambda table: with_codes(table, lambda codes: codes[:14]), "2 coarse tokens, metadata says"),
    ],
)
def test_damaged_codes_make_no_shard(damage: Any, message: str, audio: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shard_codes(codes_settings(audio, work))
    for path in (work / "codes").glob("*/*.parquet"):
        write_table(path, damage(pq.read_table(path)), read_metadata(path))
    with pytest.raises(ShardError, match=message):
        shard_targets(targets_settings(work))
    assert not list((work / "shards").rglob("*.tar"))


def test_codes_of_another_plan_make_no_shard(audio: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shard_codes(codes_settings(audio, work))
    path = min((work / "codes").glob("*/*.parquet"))
    told = read_metadata(path)
    write_table(path, pq.read_table(path), {**told, "fingerprint": {**told["fingerprint"], "plan_rows": "0"}})
    with pytest.raises(ShardError, match="was made for another plan"):
        shard_targets(targets_settings(work))


def with_codes(table: pa.Table, change: Any) -> pa.Table:
    codes = pa.array([codes and change(codes) for codes in table["codes"].to_pylist()], pa.list_(pa.int16()))
    return table.set_column(table.column_names.index("codes"), "codes", codes)


def test_the_plan_names_every_recording(audio: Path, tmp_path: Path) -> None:
    shard_codes(codes_settings(audio, tmp_path / "work"))
    plan = Plan(tmp_path / "work" / PLAN_NAME)
    planned = {row["recording"] for number in range(len(plan.shards)) for row in plan.rows(number)}
    assert planned == {f"{voice}/a.wav" for voice in ("anna", "ben", "carl")}
