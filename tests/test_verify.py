"""`just verify` and `just inspect`, and making damaged shards again."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.codes import shard_codes
from pipeline.execute import summarize
from pipeline.inspect import inspect
from pipeline.plan import make_plan
from pipeline.settings import InspectSettings, VerifySettings
from pipeline.statuses import COLUMNS, Statuses
from pipeline.targets import shard_targets
from pipeline.verify import verify
from shards.contract import FAILED, INDEX_NAME, OK, REJECTED, SIDECAR_SCHEMA, SUMS_NAME, TOO_SHORT
from shards.errors import ShardError, UserError
from shards.files import described, exclusive
from shards.index import compact, load, shard_list
from shards.writer import read_metadata, read_table, write_table
from tests.command_helpers import in_process, refused
from tests.helpers import codes_settings, run_command, targets_settings
from tests.shard_helpers import all_problems, flip


def test_verify_finds_whole_shards_whole(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(VerifySettings(shards=work / "shards", threads="auto"))
    assert "4 shards are whole" in capsys.readouterr().out


def test_verify_as_a_command_says_each_problem_in_one_line(shards: Path) -> None:
    whole = run_command("pipeline", "verify", f"shards={shards}")
    assert (whole.returncode, whole.stdout) == (0, f"{shards}: 4 shards are whole\n")

    index = load(shards, "train")
    row = index.table.slice(0, 1).to_pylist()[0]
    flip(shards / "train" / "000000.tar", row["offset"] + 700, 1)
    (shards / "train" / "000001.tar").unlink()
    damaged = run_command("pipeline", "verify", f"shards={shards}")
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines() == [
        f"{shards}/train/000000.tar: its sha256 is not the sidecar's",
        f"{shards}/train/000000.tar: {row['key']}: crc32 differs",
        f"{shards}/train/000001.tar: missing",
    ]
    assert damaged.stderr.splitlines()[-1].startswith("error: 3 problem(s) in 4 shards")
    assert "Traceback" not in damaged.stderr


def test_ctrl_c_while_problems_are_said_waits_for_no_further_shard(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, never = list[int](), threading.Event()

    def problems(*place: Any) -> Iterator[str]:
        looked_at.append(1)
        if len(looked_at) > 1:
            never.wait(0.5)
        yield "damaged"

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.verify.problems", problems)
    monkeypatch.setattr("pipeline.verify.tqdm.write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(VerifySettings(shards=work / "shards", threads=1))
    assert len(looked_at) < 4


def test_verify_of_no_shards_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="just shard-targets"):
        verify(VerifySettings(shards=tmp_path, threads="auto"))


def test_verify_names_shards_that_the_index_does_not_know(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact(shards, shard_list(shards)[1:])
    with pytest.raises(ShardError, match=r"2 problem\(s\) in 3 shards"):
        verify(VerifySettings(shards=shards, threads="auto"))
    assert capsys.readouterr().out.splitlines() == [
        f"{shards}/train/000000.parquet: not in the index: run `just shard-targets` to its end",
        f"{shards}/train/000000.tar: not in the index: run `just shard-targets` to its end",
    ]


def test_what_is_damaged_can_be_set_aside(work: Path, shards: Path) -> None:
    """Where its recordings are gone: the other shards are a whole folder, and training reads it."""
    (damaged,) = load(shards, "train").table.slice(0, 1).to_pylist()
    flip(shards / "train" / "000000.tar", damaged["offset"] + 700, 1)
    (shards / "train" / "000001.tar").unlink()
    aside = run_command("pipeline", "verify", f"shards={shards}", "set_aside=true")
    assert aside.returncode == 0, aside.stderr
    assert f"2 of 4 shards are in {shards}/damaged and no longer in the index" in aside.stdout
    assert sorted(str(path.relative_to(shards / "damaged")) for path in shards.glob("damaged/*/*")) == [
        "train/000000.parquet", "train/000000.tar", "train/000001.parquet",
    ]  # fmt: skip
    assert all_problems(shards) == []
    assert run_command("pipeline", "verify", f"shards={shards}").stdout == f"{shards}: 2 shards are whole\n"
    left = set(load(work / "shards", "train").table["key"].to_pylist()) - set(
        load(shards, "train").table["key"].to_pylist()
    )
    assert {key.split("-")[0] for key in left} == {"000000", "000001"}
    assert read_metadata(shards / "index.parquet") == read_metadata(work / "shards" / "index.parquet")


def test_what_else_is_wrong_is_an_error_beside_what_is_set_aside(shards: Path) -> None:
    compact(shards, shard_list(shards)[1:])
    (shards / "train" / "000001.tar").unlink()
    aside = run_command("pipeline", "verify", f"shards={shards}", "set_aside=true")
    assert aside.returncode == 1
    assert "1 of 3 shards are in" in aside.stdout
    assert "error: 2 problem(s) in 2 shards" in aside.stderr
    assert not (shards.parent / ".lock").exists()  # no plan lies there, and so no run makes shards


def test_what_cannot_be_read_is_named_and_stays(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad block, or a server that is away for a moment: the shard may be whole, and all others are checked."""
    (shards / "train" / "000001.tar").unlink()
    unread = [shards / "train" / "000000.tar", shards / "validation" / "000000.parquet"]
    opened = Path.open

    class Unreadable(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(path: Path, *how: Any, **more: Any) -> Any:
        return Unreadable(path) if path in unread else opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(ShardError, match=r"3 problem\(s\) in 4 shards"):
        verify(VerifySettings(shards=shards, threads=1))
    bad = [f"{path}: Input/output error" for path in unread]
    assert capsys.readouterr().out.splitlines() == [bad[0], f"{shards}/train/000001.tar: missing", bad[1]]
    unread.pop()  # of the sidecars the index is made
    with pytest.raises(ShardError, match=r"1 problem\(s\) in 3 shards"):
        verify(VerifySettings(shards=shards, threads=1, set_aside=True))
    assert [path.name for path in shards.glob("damaged/*/*")] == ["000001.parquet"]
    for name in (INDEX_NAME, SUMS_NAME):
        unread[:] = [shards / name]
        with pytest.raises(OSError, match="error") as error:
            verify(VerifySettings(shards=shards, threads=1))
        assert described(error.value) == f"Input/output error: {shards / name}"


def test_nothing_is_set_aside_while_a_run_may_make_it_again(work: Path, tmp_path: Path) -> None:
    """What it had just made would not be what the index says."""
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    link = tmp_path / "link"
    link.symlink_to(copy / "shards")
    with exclusive(copy):
        for shards in (copy / "shards", link, copy / "shards" / "train" / ".."):
            refused(["verify", f"shards={shards}", "set_aside=true"], f"{copy}: another process is writing here")
        assert in_process(["verify", f"shards={copy}/shards"]).exit_code == 0
        (copy / "shards").rename(tmp_path / "elsewhere")
        (copy / "shards").symlink_to(tmp_path / "elsewhere")
        refused(["verify", f"shards={copy}/shards", "set_aside=true"], f"{copy}: another process is writing here")


def test_where_nothing_is_whole_nothing_is_set_aside(shards: Path) -> None:
    for tar in shards.glob("*/*.tar"):
        os.truncate(tar, 100)
    before = (shards / "index.parquet").read_bytes()
    with pytest.raises(ShardError, match="no shard is whole, and nothing was set aside"):
        verify(VerifySettings(shards=shards, threads=1, set_aside=True))
    assert (shards / "index.parquet").read_bytes() == before
    assert not (shards / "damaged").exists()


def test_nothing_is_set_aside_in_a_bucket() -> None:
    refused = run_command("pipeline", "verify", "shards=s3://bucket/shards", "set_aside=true")
    assert refused.returncode != 0
    assert "set_aside=true moves files of a folder on this machine" in refused.stderr


def test_what_is_damaged_can_be_made_again(work: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    os.truncate(copy / "shards" / "train" / "000000.tar", 5000)
    (copy / "shards" / "train" / "000001.tar").unlink()
    (copy / "shards" / "train" / "000002.parquet").unlink()
    shard_targets(targets_settings(copy))
    assert all_problems(copy / "shards") == []
    assert (copy / "shards" / "index.parquet").read_bytes() == (work / "shards" / "index.parquet").read_bytes()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("plan.parquet", ["29 rows", "segment_length", "statuses: {'ok': 24, 'too_short': 5}", "usable: 24 segments"]),
        ("codes/train/000000.parquet", ["8 rows", "snac_sha256", "key=000000-00000", "codes=["]),
        ("shards/train/000000.parquet", ["8 rows", "tar_sha256", "key=000000-00000", "level_db="]),
        (
            "shards/index.parquet",
            ["29 rows", "\n    teacher: recording\n", "split=train", "reason=its end is shorter than"],
        ),
        ("shards/train/000000.tar", ["18 members, 6 samples", "000000-00000: codes (10, 7), target (28672,)"]),
        ("shards", ["index.parquet: 29 rows"]),
        (".", ["shards/index.parquet: 29 rows"]),
    ],
)
def test_inspect_prints_each_kind_of_file(
    file: str, expected: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(InspectSettings(path=work / file, rows=8))
    out = capsys.readouterr().out
    for text in expected:
        assert text in out
    assert "None" not in out
    printed = len(re.findall(r"^  (?:\d{6}-\d{5}: |key=|split=)", out, flags=re.MULTILINE))
    assert printed == (6 if file.endswith(".tar") else 8)


def rewritten(shards: Path, change: Callable[[dict[str, Any]], object], fingerprint: Any = None) -> None:
    """A sidecar of which every usable row is changed, with an index and sums that agree with it."""
    path = shards / "train" / "000000.parquet"
    metadata, rows = read_metadata(path), read_table(path).to_pylist()
    for row in rows:
        if row["status"] == OK:
            change(row)
    write_table(
        path,
        pa.Table.from_pylist(rows, SIDECAR_SCHEMA),
        metadata | ({"fingerprint": fingerprint} if fingerprint else {}),
    )
    compact(shards, shard_list(shards))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offset": None}, "offset is missing where the status is ok"),
        ({"length": None}, "length is missing"),
        ({"length": 2**50}, f"length is {2**50}"),
        ({"length": -5}, "length is -5"),
        ({"offset": -512}, "offset is -512"),
        ({"n_samples": None}, "n_samples is missing"),
        ({"recording": "other"}, "its json differs from its row: recording is "),
        ({"recording": None}, "its json differs from its row: recording is "),
        ({"start_seconds": 7.5}, "start_seconds is "),
    ],
)
def test_rows_that_say_something_else_than_samples(
    changed: dict[str, Any], message: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(shards, lambda row: row.update(changed))
    with pytest.raises(ShardError, match="problem"):
        verify(VerifySettings(shards=shards, threads="auto"))
    assert message in capsys.readouterr().out
    if "json" not in message and "start" not in message:
        with pytest.raises(ShardError, match=message.split(" where")[0]):
            load(shards, "train")
        with pytest.raises(ShardError, match=message.split(" where")[0]):
            inspect(InspectSettings(path=shards / "train" / "000000.tar", rows=3))


def test_a_fingerprint_that_is_none_is_named(shards: Path) -> None:
    with pytest.raises(ShardError, match=r"its fingerprint is \['a'\]"):
        rewritten(shards, lambda row: None, ["a"])


@pytest.mark.parametrize(
    "columns",
    [
        {"status": [["a"]], "reason": ["b"], "recording": ["c"], "n_coarse": [1]},
        {"status": [1], "reason": ["b"], "recording": ["c"], "n_coarse": [1]},
        {"status": ["ok"], "reason": [None], "recording": ["c"], "n_coarse": [1], "n_samples": ["many"]},
        {
            "status": ["ok"],
            "reason": [None],
            "recording": ["c"],
            "n_coarse": [1],
            "n_samples": pa.array([None], pa.int64()),
        },
        {"when": pa.array([2**30], pa.date32())},
    ],
)
def test_inspect_refuses_foreign_tables(columns: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ShardError, match=r"not a table of ours|damaged, or no file of ours"):
        inspect(InspectSettings(path=tmp_path / "a.parquet", rows=6))


def test_inspect_writes_out_what_a_terminal_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"key": "\x1b[2J", "status": FAILED, "reason": "\x1b]0;title\x07"}]
    write_table(tmp_path / "a.parquet", pa.Table.from_pylist(rows, SIDECAR_SCHEMA), {"settings": "\x1b[2J"})
    inspect(InspectSettings(path=tmp_path / "a.parquet", rows=6))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\\x1b") == 4


def test_inspect_prints_first_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses = [OK, TOO_SHORT, OK, REJECTED, TOO_SHORT, FAILED]
    rows = [{"key": str(place), "status": status, "n_samples": 1} for place, status in enumerate(statuses)]
    write_table(tmp_path / "a.parquet", pa.Table.from_pylist(rows, SIDECAR_SCHEMA), {})
    inspect(InspectSettings(path=tmp_path / "a.parquet", rows=6))
    assert re.findall(r"^  key=(\d)", capsys.readouterr().out, re.MULTILINE) == ["5", "3", "1", "4", "0", "2"]


def test_inspect_says_what_the_index_lacks(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "work"))
    table = pq.read_table(copy / "shards" / "index.parquet")
    pq.write_table(table.slice(0, 20), copy / "shards" / "index.parquet")
    inspect(InspectSettings(path=copy, rows=0))
    assert "plan.parquet: 29 segments, 9 of them not in the index yet" in capsys.readouterr().out


def test_inspect_counts_what_there_is_before_the_index(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio, work = tmp_path / "audio", tmp_path / "work"
    shutil.copytree(recordings, audio)
    make_plan(codes_settings(audio, work))
    inspect(InspectSettings(path=work, rows=0))
    assert "codes of 0, targets of 0\n  statuses: {}\n" in capsys.readouterr().out
    (audio / "speaker_1" / "take_0.wav").unlink()
    shard_codes(codes_settings(audio, work, "max_failed_fraction=0.5"))
    inspect(InspectSettings(path=work, rows=0))
    said = capsys.readouterr().out.rpartition("plan.parquet")[2]
    assert re.match(r": 29 segments in (\d) shards; codes of \1, targets of 0\n", said)
    assert re.search(
        r"'failed': (\d)\b[^×]*×[^×]*\n    \1 × No such file or directory since planning \(such as speaker_1", said
    )


def test_reasons_that_differ_by_a_number_are_one_kind() -> None:
    schema = pa.schema([SIDECAR_SCHEMA.field(name) for name in COLUMNS])
    rows: list[tuple[str, int, str, str | None]] = [(f"r{n}", 5, FAILED, f"broken near {n}.5 s") for n in range(40)]
    rows += [("same", 5, TOO_SHORT, "shorter than min_seconds=1")] * 50 + [("fine", 5, OK, None)]
    rows += [("gone", 0, FAILED, "the file is empty"), ("back", 0, FAILED, "the file is empty")]
    statuses = Statuses()
    for part in (rows[:60], rows[60:], [("back", 7, OK, None)]):
        statuses.add(pa.table([*zip(*part, strict=True)], schema))
    assert statuses.counts() == {FAILED: 41, TOO_SHORT: 50, OK: 2}
    assert statuses.unplanned == 1
    assert list(statuses.reasons()) == [
        "50 × shorter than min_seconds=1 (such as same)",
        "40 × broken near … s (such as r0: broken near 0.5 s)",
        "1 × the file is empty (gone)",
    ]


def test_reasons_that_are_not_shown_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = pa.schema([SIDECAR_SCHEMA.field(name) for name in COLUMNS])
    rows = [(name, 5, OK, None) for name in "ab"] + [(name, 5, FAILED, f"reason {name}") for name in "cdefghi"]
    pq.write_table(pa.table([*zip(*rows, strict=True)], schema), tmp_path / "a.parquet")
    summarize([tmp_path / "a.parquet"], 1.0, "codes")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  1 × reason g (g)",
        "  and 2 more reasons: `just inspect` shows them",
    ]
    summarize([tmp_path / "a.parquet"], 7 / 9, "codes")
    with pytest.raises(UserError, match=r"^7 of 9 segments failed or were rejected, above max_failed_fraction=0\.75"):
        summarize([tmp_path / "a.parquet"], 0.75, "codes")


def test_what_was_rejected_is_not_said_to_be_retried(tmp_path: Path) -> None:
    schema = pa.schema([SIDECAR_SCHEMA.field(name) for name in COLUMNS])
    rows = [("a", 5, OK, None), ("b", 5, REJECTED, "reason")]
    pq.write_table(pa.table([*zip(*rows, strict=True)], schema), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        summarize([tmp_path / "a.parquet"], 0.25, "shards")
    assert str(error.value).endswith(
        "kept: raise max_failed_fraction. What was rejected stays so: docs/scale.md says how to try other limits"
    )


def test_inspect_says_what_it_expects(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "cut.parquet").write_bytes((work / "plan.parquet").read_bytes()[:1000])
    (tmp_path / "alone.tar").write_bytes((work / "shards" / "train" / "000000.tar").read_bytes())
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "other.tar").write_bytes((work / "shards" / "train" / "000000.tar").read_bytes())
    (tmp_path / "other.parquet").write_bytes((work / "plan.parquet").read_bytes())
    for name, message in [
        ("notes.txt", r"expected a \.parquet or \.tar of ours, or a folder with plan\.parquet or index\.parquet"),
        ("absent.parquet", "expected a"),
        (".", "expected a"),
        ("folder.tar", "expected a"),
        ("cut.parquet", "damaged, or no file of ours"),
        ("alone.tar", r"expected its sidecar alone\.parquet beside it"),
        ("other.tar", r"other\.parquet: its columns are not those of its kind"),
    ]:
        with pytest.raises(UserError, match=message):
            inspect(InspectSettings(path=tmp_path / name, rows=2))


@pytest.mark.parametrize("length", [0, 100, 3000, 100_000])
def test_inspect_names_a_cut_tar(length: int, shards: Path) -> None:
    path = shards / "train" / "000000.tar"
    os.truncate(path, length)
    with pytest.raises(ShardError, match=re.escape(str(path))):
        inspect(InspectSettings(path=path, rows=1000))


def test_coreutils_check_the_sums(shards: Path) -> None:
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=shards, check=False).returncode == 0
    flip(shards / "index.parquet", 100, 0)
    assert subprocess.run(check, cwd=shards, check=False, capture_output=True).returncode == 1
