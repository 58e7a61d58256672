"""Recordings added to a plan become new shards; of what stands, no byte changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.codes import shard_codes
from pipeline.plan import Plan
from pipeline.targets import shard_targets
from shards.contract import INDEX_NAME, PLAN_NAME, SPLITS, SUMS_NAME
from shards.errors import UserError
from shards.index import load
from tests.command_helpers import in_process, refused, stamps
from tests.helpers import codes_settings, codes_words, speechlike, targets_settings, targets_words
from tests.training_helpers import assert_same_state, small_training


@pytest.fixture
def extended(recordings: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Audio with a new speaker and new recordings of known ones, and a work folder made before they came."""
    audio, work = Path(shutil.copytree(recordings, tmp_path / "audio")), tmp_path / "work"
    shard_codes(codes_settings(audio, work))
    shard_targets(targets_settings(work))
    for seed, name in enumerate(("speaker_0/new", "speaker_1/new", "speaker_2/new", "speaker_3/new", "speaker_9/a")):
        (audio / name).parent.mkdir(exist_ok=True)
        soundfile.write(audio / f"{name}.wav", speechlike(1.5, 16_000, 70 + seed), 16_000)
    return audio, work


def test_new_recordings_are_refused_unless_asked_for(extended: tuple[Path, Path]) -> None:
    audio, work = extended
    before = stamps(work)
    refused(codes_words(audio, work), "5 recordings such as 'speaker_0/new.wav' were added")
    assert stamps(work) == before


def test_new_shards_follow_those_that_stand(extended: tuple[Path, Path]) -> None:
    audio, work = extended
    plan, index = Plan(work / PLAN_NAME), pq.read_table(work / "shards" / "index.parquet")
    rows = [plan.table(number) for number in range(len(plan.shards))]
    made = {name: found for name, found in stamps(work).items() if Path(name).stem.isdigit()}
    planning = in_process(codes_words(audio, work, "extend=true"))
    assert planning.exit_code == 0
    assert in_process(targets_words(work)).exit_code == 0

    longer = Plan(work / PLAN_NAME)
    known = len(plan.shards)
    assert f"new: 5 of the plan's recordings, {len(longer.shards) - known} of its shards" in planning.output
    assert "planned: train: " in planning.output
    assert longer.shards[:known] == plan.shards
    assert longer.rows_sha256[:known] == plan.rows_sha256
    assert [longer.table(number).equals(rows[number]) for number in range(known)] == [True] * known
    assert {name: stamps(work)[name] for name in made} == made  # not even written again
    new = [row for number in range(known, len(longer.shards)) for row in longer.rows(number)]
    assert {row["recording"] for row in new} == {*(f"speaker_{n}/new.wav" for n in range(4)), "speaker_9/a.wav"}
    assert len(set(longer.shards)) == len(longer.shards)

    groups = dict(zip(*(pq.read_table(work / PLAN_NAME)[name].to_pylist() for name in ("group", "split")), strict=True))
    for row in (row for table in rows for row in table.to_pylist()):
        assert groups[row["group"]] == row["split"]
    extended_index = pq.read_table(work / "shards" / "index.parquet")
    assert extended_index.slice(0, len(index)).equals(index)
    assert len(extended_index) == len(index) + len(new)
    assert load(work / "shards", "train").counts
    assert in_process(["verify", f"shards={work / 'shards'}"]).exit_code == 0


def test_a_training_goes_on_with_the_index_that_was_kept(extended: tuple[Path, Path], tmp_path: Path) -> None:
    """In a folder of its own, with links to the shards, as docs/scale.md says."""
    (audio, work), kept = extended, tmp_path / "work" / "shards-before"
    whole = small_training(work, tmp_path / "whole", max_steps=4)
    small_training(work, tmp_path / "stopped", max_steps=2)
    kept.mkdir()
    for name in (INDEX_NAME, SUMS_NAME):
        shutil.copy(work / "shards" / name, kept)
    for split in SPLITS:
        (kept / split).symlink_to(Path("..", "shards", split))
    for words in (codes_words(audio, work, "extend=true"), targets_words(work)):
        assert in_process(words).exit_code == 0
    with pytest.raises(UserError, match=r"samples is \w{64}, now \w{64}"):
        small_training(work, tmp_path / "stopped", max_steps=4)
    resumed = small_training(work, tmp_path / "stopped", max_steps=4, shards=str(kept))
    resumed["validations_since_best"] = whole["validations_since_best"]  # the stop was validated too
    assert_same_state(resumed, whole)


def test_what_could_not_be_read_goes_into_new_shards_once_it_can(extended: tuple[Path, Path], tmp_path: Path) -> None:
    audio, _ = extended
    work, broken = tmp_path / "another", audio / "speaker_0" / "broken.wav"
    broken.write_text("no audio")
    assert in_process(codes_words(audio, work, "max_failed_fraction=0.01")).exit_code == 1
    few = "max_failed_fraction=0.5"
    assert in_process(codes_words(audio, work, few)).exit_code == 0
    soundfile.write(broken, speechlike(1.5, 16_000, 99), 16_000)
    before = {name: found for name, found in stamps(work).items() if Path(name).stem.isdigit()}
    assert in_process(codes_words(audio, work, few, "retry=failed")).exit_code == 0
    assert {name: stamps(work)[name] for name in before} == before, "a second try cannot mend what was planned"
    assert in_process(codes_words(audio, work, few, "extend=true")).exit_code == 0
    rows = [row for row in pq.read_table(work / PLAN_NAME).to_pylist() if row["recording"] == "speaker_0/broken.wav"]
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "ok"]
    assert in_process(targets_words(work, "max_failed_fraction=0")).exit_code == 0, "nothing is lost any more"
    plan = (work / PLAN_NAME).read_bytes()
    assert in_process(codes_words(audio, work, few, "extend=true")).exit_code == 0
    assert (work / PLAN_NAME).read_bytes() == plan


def test_extending_by_nothing_changes_nothing(extended: tuple[Path, Path]) -> None:
    audio, work = extended
    assert in_process(codes_words(audio, work, "extend=true")).exit_code == 0
    before = (work / PLAN_NAME).read_bytes()
    assert in_process(codes_words(audio, work, "extend=true")).exit_code == 0
    assert in_process(codes_words(audio, work)).exit_code == 0
    assert (work / PLAN_NAME).read_bytes() == before
