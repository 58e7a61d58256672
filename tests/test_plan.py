"""A plan is a function of recordings and settings; no group is cut, and segments tile each recording."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import soundfile

from pipeline.dealing import Segments
from pipeline.measure import measure
from pipeline.plan import Plan, make_plan, rows_sha256
from pipeline.sources import FOUND_SCHEMA
from pipeline.splits import assign_splits
from shards.contract import OK, PLAN_NAME, PLAN_SCHEMA, TOO_SHORT, Row
from shards.errors import UserError
from tests.helpers import codes_settings


def write(path: Path, seconds: float = 1.0, rate: int = 8_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * rate), np.float32), rate)
    return path


def planned(audio: Path, work: Path, *overrides: str) -> list[Row]:
    plan = make_plan(codes_settings(audio, work, *overrides))
    return [row for number in range(len(plan.shards)) for row in plan.rows(number)]


@pytest.mark.parametrize("groups", [2, 3, 50])
@pytest.mark.parametrize("fraction", [1e-9, 0.25, 1 - 1e-9])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_both_splits_hold_groups(groups: int, fraction: float, seed: int) -> None:
    given = [(f"voice {n % groups}", None) for n in range(3 * groups)]
    splits = assign_splits(given, fraction, seed)
    assert len(splits) == groups
    assert set(splits.values()) == {"train", "validation"}
    assert assign_splits(given[::-1], fraction, seed) == splits


def test_splits_stay_as_recordings_are_added_and_follow_fraction_and_seed() -> None:
    given = [(f"voice {n % 400}", None) for n in range(800)]
    splits = assign_splits(given, 0.25, 0)
    more = [*given, *((f"voice {n}", None) for n in range(600))]
    assert {group: split for group, split in assign_splits(more, 0.25, 0).items() if group in splits} == splits
    assert 0.18 < list(splits.values()).count("validation") / 400 < 0.32
    assert assign_splits(given, 0.25, 1) != splits
    for split, smallest, others in (("validation", 1e-9, (0.02, 0.5)), ("train", 1 - 1e-9, (0.5, 0.95))):
        chosen, *more_of_it = [
            {group for group, its in assign_splits(given, fraction, 0).items() if its == split}
            for fraction in (smallest, *others)
        ]
        assert len(chosen) == 1, "one group fills a split that would be empty"
        assert all(chosen < larger for larger in more_of_it), "the first that a larger one would hold"


def test_splits_that_cannot_be() -> None:
    with pytest.raises(
        UserError, match=r"no group is left for \w+: found 1 group, such as 'anna'.*one speaker, set group_"
    ):
        assign_splits([("anna", None), ("anna", None)], 0.25, 0)
    with pytest.raises(UserError, match="no group is left for validation: found 2"):
        assign_splits([("anna", "train"), ("ben", "train")], 0.25, 0)
    with pytest.raises(UserError, match=r"'anna' stands in more than one split.*speaker, set group_pattern='\(\.\*\)'"):
        assign_splits([("anna", "train"), ("anna", "validation")], 0.25, 0)
    given: list[tuple[str, str | None]] = [("anna", "validation"), ("ben", None), ("carl", None)]
    assert assign_splits(given, 1 - 1e-9, 0)["anna"] == "validation"
    assert set(assign_splits(given[:2], 1 - 1e-9, 0).values()) == {"train", "validation"}


def test_where_a_split_is_empty_for_want_of_usable_recordings_it_is_said(recordings: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    one, two = sorted(recordings.glob("*/take_0.wav"))[:2]
    manifest.write_text(f"path,id,start,end,speaker,split\n{one},one,5,2,anna,train\n{two},two,,,ben,validation\n")
    with pytest.raises(
        UserError, match=r"no group is left for train.*1 of 2 recordings cannot be used, such as one: start 5"
    ):
        make_plan(codes_settings(manifest, tmp_path / "work"))


def test_one_voice_of_a_manifest_is_split_without_its_speaker(recordings: Path, tmp_path: Path) -> None:
    takes = sorted(recordings.glob("speaker_0/*.wav"))
    splits = ["train"] * (len(takes) - 1) + ["validation"]
    manifest = tmp_path / "m.csv"
    lines = [f"{path},{split}" for path, split in zip(takes, splits, strict=True)]
    manifest.write_text("\n".join(["path,split,speaker", *(f"{line},anna" for line in lines)]))
    settings = codes_settings(manifest, tmp_path / "work", "group_pattern=(.*)")
    with pytest.raises(UserError, match="leave out the speaker"):
        make_plan(settings)
    manifest.write_text("\n".join(["path,split", *lines]))
    make_plan(settings)
    found = {row["path"]: row["split"] for row in pq.read_table(tmp_path / "work" / PLAN_NAME).to_pylist()}
    assert found == dict(zip(map(str, takes), splits, strict=True))


def test_who_says_what_a_group_is_is_not_told_to(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(codes_settings(recordings, tmp_path / "folders"))
    make_plan(codes_settings(recordings, tmp_path / "each", "group_pattern=(.*)"))
    said = capsys.readouterr().out
    assert said.startswith(f"listing {recordings}\nplanned: "), "which may take long"
    folders, each = re.findall("planned: .*", said)
    assert folders.endswith(" A group should be a speaker: group_pattern= says which")
    assert "group_pattern" not in each


def test_no_group_is_in_both_splits_and_rows_are_numbered(recordings: Path, tmp_path: Path) -> None:
    rows = planned(recordings, tmp_path / "work", "segments_per_shard=5")
    splits = defaultdict(set)
    for row in rows:
        splits[row["group"]].add(row["split"])
    assert sorted(len(found) for found in splits.values()) == [1, 1, 1, 1]
    shards = defaultdict(list)
    for row in rows:
        shards[row["split"], row["shard"]].append(row["row"])
    assert list(shards) == Plan(tmp_path / "work" / PLAN_NAME).shards
    assert all(numbers == list(range(len(numbers))) for numbers in shards.values())
    assert all(len(shards[s, n]) == 5 for s, n in shards if (s, n + 1) in shards)


def test_the_same_plan_twice_is_the_same_bytes(recordings: Path, tmp_path: Path) -> None:
    for work in ("a", "b"):
        planned(recordings, tmp_path / work)
    first = (tmp_path / "a" / PLAN_NAME).read_bytes()
    assert first == (tmp_path / "b" / PLAN_NAME).read_bytes()
    planned(recordings, tmp_path / "a", "window_seconds=7", "batch_seconds=9")  # not settings of the plan
    assert (tmp_path / "a" / PLAN_NAME).read_bytes() == first


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("segment_length=0.7", "segment_length is 0.6, now 0.7"),
        ("seed=1", "seed is 0, now 1"),
        ("min_seconds=0.2", "min_seconds is 0.3, now 0.2"),
        ("segments_per_shard=9", "segments_per_shard is 8, now 9"),
        ("validation_fraction=0.5", "validation_fraction is 0.25, now 0.5"),
        ("group_pattern=(.*)", r"group_pattern is None, now \(\.\*\)"),
    ],
)
def test_other_settings_are_refused(override: str, difference: str, recordings: Path, tmp_path: Path) -> None:
    planned(recordings, tmp_path)
    with pytest.raises(UserError, match=rf"made with other settings \({difference}\): use another work= or delete it"):
        planned(recordings, tmp_path, override)


def test_recordings_that_moved_are_found_by_a_link(recordings: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(recordings, old)
    rows = planned(old, tmp_path / "work")
    old.rename(new)
    with pytest.raises(UserError, match="where recordings only moved, a link at their old place will do"):
        planned(new, tmp_path / "work")
    old.symlink_to(new)
    assert planned(old, tmp_path / "work") == rows


def test_rows_sha256_knows_all_but_the_place() -> None:
    row: Row = {"path": "a/b.wav", "recording": "b.wav", "reason": None, "n_coarse": 3, "offset": None}
    same = rows_sha256(rows_of(row))
    assert same == rows_sha256(rows_of(row)) == rows_sha256(rows_of({**row, "path": "c/b.wav"}))
    others: list[Row] = [{"n_coarse": 4}, {"n_coarse": None}, {"recording": "c.wav"}, {"reason": ""}, {"offset": 0}]
    assert len({same, *(rows_sha256(rows_of({**row, **other})) for other in others)}) == 1 + len(others)
    assert len({rows_sha256(rows_of(*rows)) for rows in ([row], [row, row])}) == 2


def rows_of(*rows: Row) -> pa.Table:
    return pa.Table.from_pylist(list(rows), pa.schema([PLAN_SCHEMA.field(name) for name in rows[0]]))


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 192_000])
@pytest.mark.parametrize("length", [1, 7, 47])
def test_segments_against_a_plain_loop(rate: int, length: int) -> None:
    random = np.random.default_rng(rate + length)
    token = 4096 * rate // 48_000
    lengths = {
        1,
        2,
        token - 1,
        token,
        token + 1,
        2 * token,
        length * token,
        *random.integers(1, 30 * token, 60).tolist(),
    }
    for frames in lengths:
        known = {"frames": [frames], "rate": [rate], "problem": pa.nulls(1, pa.string())}
        segments = Segments(pa.table(known), length)
        rows = segments.rows(0, len(segments), 0.5).to_pylist()
        assert segments.rows(1, 3, 0.5).to_pylist() == rows[1:3]
        samples, start = -(-frames * 48_000 // rate), 0
        expected: list[tuple[int, int, int, int, str]] = []
        while start * 4096 < samples:
            left = samples - start * 4096
            n_samples = min(left, length * 4096)
            status = TOO_SHORT if n_samples < 24_000 else OK
            expected.append((len(expected), start, -(-n_samples // 4096), n_samples, status))
            start += length
        names = ("segment", "start_coarse", "n_coarse", "n_samples", "status")
        assert [tuple(row[name] for name in names) for row in rows] == expected, frames
        assert sum(row["n_samples"] for row in rows) == samples
        for row in rows:
            assert (row["n_coarse"] - 1) * 4096 < row["n_samples"] <= row["n_coarse"] * 4096
            assert (row["reason"] is None) == (row["status"] == OK)
            if row["reason"]:
                assert row["reason"].startswith("its end is shorter" if row["segment"] else "shorter")


@pytest.mark.parametrize(("frames", "status"), [(14_399, TOO_SHORT), (14_400, OK)])
def test_min_seconds(frames: int, status: str, tmp_path: Path) -> None:
    write(tmp_path / "audio" / "ben" / "b.wav")
    write(tmp_path / "audio" / "anna" / "a.wav", frames / 48_000, 48_000)
    rows = planned(tmp_path / "audio", tmp_path / "work", "min_seconds=0.3")
    (row,) = [row for row in rows if row["group"] == "anna"]
    assert (row["status"], row["n_samples"]) == (status, frames)
    assert row["reason"] == (None if status == OK else "shorter than min_seconds=0.3")


def test_a_missing_plan_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan\.parquet is missing: run `just shard-codes` first"):
        Plan(tmp_path / PLAN_NAME)


def test_an_end_rounded_past_the_file_is_its_end(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(9_996, np.float32), 10_000)
    asked = [{"path": str(tmp_path / "a.wav"), "start": 0.5, "end": end} for end in (1.0, 1.12, 0.50001)]
    near, far, nothing = measure(pa.Table.from_pylist(asked, FOUND_SCHEMA)).to_pylist()
    assert (near["problem"], near["first_frame"], near["frames"]) == (None, 5_000, 4_996)
    assert far["problem"] == "0.5 … 1.12 s is not inside its 0.9996 s, or holds no sample"
    assert nothing["problem"] == "0.5 … 0.50001 s is not inside its 0.9996 s, or holds no sample"


def test_recordings_that_cannot_be_used_fill_no_split(tmp_path: Path) -> None:
    for voice in ("anna", "ben", "carl"):
        (tmp_path / "audio" / voice).mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / voice / "a.wav", np.ones(24_000, np.float32) / 4, 24_000)
    for broken in ("dora", "emil", "finn", "gina"):
        (tmp_path / "audio" / broken).mkdir()
        (tmp_path / "audio" / broken / "a.wav").write_text("no audio")
    for seed in range(8):
        work = tmp_path / f"work_{seed}"
        plan = make_plan(codes_settings(tmp_path / "audio", work, f"seed={seed}", "validation_fraction=0.01"))
        rows = [row for number in range(len(plan.shards)) for row in plan.rows(number)]
        assert {row["split"] for row in rows if row["status"] == OK} == {"train", "validation"}


def test_recordings_added_to_a_plan_are_not_ignored(tmp_path: Path) -> None:
    for name in ("anna/a", "ben/a"):
        (tmp_path / "audio" / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.ones(24_000, np.float32) / 4, 24_000)
    settings = codes_settings(tmp_path / "audio", tmp_path / "work")
    make_plan(settings)
    make_plan(settings)
    (tmp_path / "audio" / "ben" / "new.wav").write_bytes((tmp_path / "audio" / "ben" / "a.wav").read_bytes())
    with pytest.raises(UserError, match=r"1 recordings such as 'ben/new.wav' were added"):
        make_plan(settings)


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / PLAN_NAME).write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=rf"{PLAN_NAME}: damaged"):
        Plan(tmp_path / PLAN_NAME)


def test_rows_that_were_not_planned_are_refused(recordings: Path, tmp_path: Path) -> None:
    """A file that is whole, but says something else."""
    plan = make_plan(codes_settings(recordings, tmp_path))
    path = tmp_path / PLAN_NAME
    tables = [plan.table(number) for number in range(len(plan.shards))]
    metadata = {name: value for name, value in pq.read_metadata(path).metadata.items() if name != b"ARROW:schema"}
    first = PLAN_SCHEMA.names.index("first_frame")

    def later(table: pa.Table) -> pa.Table:
        return table.set_column(first, "first_frame", pc.add(table["first_frame"], 1))

    for change, left_out, message in (
        (lambda table: table.rename_columns({"first_frame": "frame"}), 0, "its columns are not those of its kind"),
        (later, 0, "shard 0 is not what was planned"),
        (lambda table: table, 1, f"{len(tables) - 1} row groups for {len(tables)} shards"),
    ):
        changed = [change(table) for table in tables[left_out:]]
        with pq.ParquetWriter(path, changed[0].schema) as writer:
            for table in changed:
                writer.write_table(table)
            writer.add_key_value_metadata(metadata)
        with pytest.raises(UserError, match=message):
            Plan(path).rows(0)


@pytest.mark.parametrize("inside", [".", "work", "a/b", "../audio/c"])
def test_shards_among_the_recordings_are_refused(inside: str, tmp_path: Path) -> None:
    """They would be recordings to the next run."""
    write(tmp_path / "audio" / "a" / "a.wav")
    with pytest.raises(UserError, match=r"lies in audio=.*: choose a folder beside it"):
        planned(tmp_path / "audio", tmp_path / "audio" / inside)
    assert [path.name for path in (tmp_path / "audio").rglob("*")] == ["a", "a.wav"]


def test_a_plan_is_good_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write(tmp_path / "audio" / name / "a.wav")
    monkeypatch.chdir(tmp_path)
    rows = planned(Path("audio"), Path("work"))
    monkeypatch.chdir(tmp_path / "audio")
    assert planned(Path("../audio").resolve(), tmp_path / "work") == rows
    assert all(Path(row["path"]).is_file() for row in rows)


def test_many_headers_are_handed_out_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million, handed out one by one, the first would be told of minutes later."""
    handed_out, submit = Counter[int](), ThreadPoolExecutor.submit

    def counted(pool: ThreadPoolExecutor, function: Any, *given: Any) -> Any:
        handed_out[id(pool)] += 1
        return submit(pool, function, *given)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    rows = [{"recording": str(n), "path": f"gone/{n}"} for n in range(20_000)]
    measured = measure(pa.Table.from_pylist(rows, FOUND_SCHEMA))
    assert measured["problem"].to_pylist() == ["no such file"] * len(rows)
    assert handed_out.total() < 300
