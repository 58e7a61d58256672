"""Recordings, work folder and shards in remote storage: the bytes of a disk, through failing and slow answers too."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import soundfile

from codec.audio import AudioError
from codec.snac import load_snac
from pipeline import execute
from pipeline.codes import shard_codes
from pipeline.measure import measure
from pipeline.plan import Plan, make_plan
from pipeline.recordings import Opener
from pipeline.settings import VerifySettings
from pipeline.sources import find
from pipeline.targets import shard_targets
from pipeline.verify import verify
from shards import storage
from shards.cache import ShardCache
from shards.contract import INDEX_NAME, OK, PLAN_NAME, SPLITS, SUMS_NAME
from shards.errors import ShardError, UserError
from shards.files import replacing
from shards.index import check_index, load
from shards.storage import Url
from tests.command_helpers import refused
from tests.helpers import TINY_SNAC, codes_settings, speechlike, targets_settings, targets_words
from tests.s3_server import Door
from tests.test_tars import by_take, write_tars
from trainer.clips import ShardClips
from trainer.report.reading import read_targets


@pytest.fixture(scope="module")
def remote(server: Door, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Url:
    """`recordings` in a bucket, as files, with a manifest beside them, and as tars."""
    folder = Url("s3://corpus/in")
    names = [path.relative_to(recordings).as_posix() for path in sorted(recordings.glob("*/*.wav"))]
    for name in names:
        upload(recordings / name, folder / "files" / name)
    manifest = tmp_path_factory.mktemp("manifest") / "list.jsonl"
    manifest.write_text("".join(json.dumps(listed(name)) + "\n" for name in names))
    upload(manifest, folder / "list.jsonl")
    for tar in sorted(write_tars(recordings, tmp_path_factory.mktemp("tars") / "tars").iterdir()):
        upload(tar, folder / "tars" / tar.name)
    return folder


def listed(name: str) -> dict[str, str]:
    return {"path": f"files/{name}", "id": name, "speaker": name.partition("/")[0]}


def upload(path: Path, url: Url) -> None:
    with replacing(url) as temporary:
        temporary.write_bytes(path.read_bytes())


def uploaded(folder: Path, url: Url) -> Url:
    for path in folder.rglob("*"):
        if path.is_file():
            upload(path, url / path.relative_to(folder).as_posix())
    return url


def same(found: Url, work: Path) -> None:
    """All but plan and settings, which say where the recordings lie."""
    objects = {str(url)[len(str(found)) + 1 :]: url for url in found.files()}
    written = (path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    files = {path.relative_to(work).as_posix(): path for path in written}
    assert objects.keys() == files.keys()
    for name, path in files.items():
        if name != "plan.parquet" and path.name != "settings.json":
            assert objects[name].read_bytes() == path.read_bytes(), name


def test_a_large_recording_that_is_replaced_while_it_is_read(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fetched block by block, by another of the same size too."""
    monkeypatch.setattr(storage, "WHOLE_BYTES", 1000)
    url = Url("s3://corpus/replaced/a.wav")

    def put(seed: int) -> None:
        with replacing(url) as temporary:
            soundfile.write(temporary, speechlike(1, 24_000, seed), 24_000)

    put(0)
    length = dict.fromkeys(("frames", "file_frames", "rate"), 24_000)
    row = {"recording": "a.wav", "path": url.text, "offset": None, "file_bytes": url.stat().st_size, **length}
    opener = Opener(row)
    recording = opener.recording({**row, "channels": 1, "first_frame": 0})
    assert sum(map(len, recording.blocks())) == 24_000
    opener.check()
    put(1)
    with pytest.raises(AudioError, match="changed while it was read"):
        opener.check()


@pytest.mark.parametrize("kind", ["none", "error", "slow", "cut"])
def test_from_a_bucket_into_a_bucket(kind: str, door: Door, remote: Url, work: Path, tmp_path: Path) -> None:
    """Every fifth answer is an error, late or cut short."""
    count = iter(range(1, 1_000_000))
    door.fault = lambda method, path: kind if kind != "none" and next(count) % 5 == 0 else None
    mine = Url(f"s3://corpus/work_{kind}")
    shard_codes(codes_settings(remote / "files", mine))
    shard_targets(targets_settings(mine))  # type: ignore[arg-type]
    door.fault = lambda method, path: None
    same(mine, work)
    assert len(load(mine / "shards", "train", ShardCache(tmp_path, 1 << 30))) == len(load(work / "shards", "train"))


def test_manifest_and_tars_of_a_bucket(door: Door, remote: Url, work: Path, tmp_path: Path) -> None:
    shard_codes(codes_settings(remote / "list.jsonl", tmp_path / "listed"))
    for path in (work / "codes").glob("*/*.parquet"):
        assert (tmp_path / "listed" / path.relative_to(work)).read_bytes() == path.read_bytes()
    shard_codes(codes_settings(remote / "tars", tmp_path / "tarred"))
    assert by_take(tmp_path / "tarred" / "codes") == by_take(work / "codes")


def test_of_a_tar_only_headers_are_read_and_that_once(door: Door, tmp_path: Path) -> None:
    """Small members do not cost a request each, and a plan that stands opens no tar that is as it was."""
    audio = tmp_path / "audio"
    for number, size in enumerate((3_000, 300_000)):
        for take in range(20):
            path = audio / f"speaker_{number}" / f"{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.zeros(size // 2, np.float32), 24_000, "PCM_16")
    far = Url("s3://corpus/tarred")
    for folder in audio.iterdir():
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(folder, "")
        upload(tmp_path / "a.tar", far / f"{folder.name}.tar")
    settings = codes_settings(far, tmp_path / "work", "group_pattern=(.*)", "min_seconds=0.01")
    door.asked.clear()
    door.sent.clear()
    make_plan(settings)
    asked = Counter(path for method, path in door.asked if method == "GET" and path.endswith(".tar"))
    assert asked["/corpus/tarred/speaker_0.tar"] <= 20 + 5
    assert asked["/corpus/tarred/speaker_1.tar"] <= 20 + 20 + 1
    assert door.sent["/corpus/tarred/speaker_1.tar"] < 0.15 * 20 * 300_000
    door.sent.clear()
    make_plan(settings)
    assert not [path for path in door.sent if path.endswith(".tar")]
    upload(tmp_path / "a.tar", far / "speaker_2.tar")
    with pytest.raises(UserError, match="20 recordings such as 'speaker_2"):
        make_plan(settings)


def write_formats(folder: Path) -> Path:
    """Noise of 20 s in each format."""
    folder.mkdir()
    kinds = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III"}
    for name, kind in kinds.items():
        container = "OGG" if name == "opus" else name.upper()
        with soundfile.SoundFile(folder / f"a.{name}", "w", 48_000, 1, kind, format=container) as file:
            for second in np.random.default_rng(0).normal(0, 0.1, (20, 48_000)):  # Vorbis is written in small pieces
                file.write(second)
    return folder


def test_planning_reads_headers_only(door: Door, tmp_path: Path) -> None:
    """And the end of an Ogg or MP3; what they say is what whole files say."""
    near, far = write_formats(tmp_path / "formats"), Url("s3://corpus/formats")
    for path in near.iterdir():
        upload(path, far / path.name)
    door.asked.clear()
    door.sent.clear()
    assert headers(far) == headers(near)
    asked = Counter(path.rpartition(".")[2] for _, path in door.asked if "/formats/a." in path)
    assert asked == {"wav": 1, "flac": 1, "ogg": 2, "opus": 2, "mp3": 2}
    sent = {path.rpartition(".")[2]: size for path, size in door.sent.items()}
    assert max(sent[kind] for kind in ("wav", "flac", "mp3")) < 20_000
    assert max(sent[kind] for kind in ("ogg", "opus")) < 90_000


def headers(audio: Any) -> list[dict[str, Any]]:
    return measure(find(audio, None)[0]).drop_columns("path").to_pylist()


def test_what_is_done_is_not_made_again_and_leftovers_go(
    door: Door, remote: Url, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Url("s3://corpus/work_twice")
    shard_codes(codes_settings(remote / "files", mine))
    left = mine / "codes" / "train" / "000000.parquet.0123abcd.tmp"
    upload(work / "plan.parquet", left)
    shard_codes(codes_settings(remote / "files", mine))
    assert left.exists(), "another run may be uploading it"
    monkeypatch.setattr(execute, "LEFT_BEHIND", timedelta(seconds=-1))  # dates are in whole seconds
    door.asked.clear()
    shard_codes(codes_settings(remote / "files", mine))
    written = [path for method, path in door.asked if method == "PUT"]
    assert all("settings.json" in path for path in written), written
    assert not [url for url in mine.files() if url.suffix == ".tmp"]


def test_a_wrong_clock_takes_nothing_from_a_run_at_work(
    door: Door, remote: Url, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a machine whose clock is two days ahead, what the storage dates now is two days old."""
    mine, models = Url("s3://corpus/work_ahead"), pytest.importorskip("moto.s3.models")
    ordinary = models.utcnow
    monkeypatch.setattr(models, "utcnow", lambda: ordinary() - timedelta(days=2))
    shard_codes(codes_settings(remote / "files", mine))
    left = mine / "codes" / "train" / "000000.parquet.next"
    upload(work / "plan.parquet", left)
    shard_codes(codes_settings(remote / "files", mine))
    assert left.exists()


def test_what_is_done_costs_few_requests(door: Door, work: Path) -> None:
    """At the start the ends of codes and sidecars, and a tar's size; then sidecars for counts, lags and the
    index, for which the last sample of each tar is compared.
    """
    mine = Url("s3://corpus/work_done")
    for path in work.rglob("*.*"):
        if path.is_file() and not path.name.startswith(".lock"):
            upload(path, Url(f"{mine}/{path.relative_to(work)}"))
    door.asked.clear()
    shard_targets(targets_settings(mine))  # type: ignore[arg-type]
    asked = Counter(
        (method, path.split("/")[3], PurePosixPath(path).suffix)
        for method, path in door.asked
        if re.search(r"/\d{6}\.\w+$", path)
    )
    shards = len(Plan(work / PLAN_NAME).shards)
    assert asked == {
        ("GET", "codes", ".parquet"): shards,
        ("GET", "shards", ".parquet"): 4 * shards + 1,
        ("HEAD", "shards", ".tar"): shards,
        ("GET", "shards", ".tar"): shards,
    }
    same(mine, work)


def test_a_tar_of_another_run_is_found_before_the_index_is_written(door: Door, work: Path, tmp_path: Path) -> None:
    """Of two runs that made the shard at once, one was the last with the tar and the other with the sidecar."""
    mine, name = uploaded(work, Url("s3://corpus/work_raced")), "shards/train/000001.tar"
    (mine / "shards" / SUMS_NAME).unlink()
    theirs = bytearray((work / name).read_bytes())
    theirs[len(theirs) - theirs[::-1].index(b"}") - 1] = ord(" ")  # in the json of the last sample
    (tmp_path / "theirs").write_bytes(theirs)
    upload(tmp_path / "theirs", mine / name)
    refused(targets_words(mine), "000001.tar: its last sample is not its sidecar's")  # type: ignore[arg-type]
    assert not (mine / "shards" / SUMS_NAME).exists()
    (mine / name).unlink()
    shard_targets(targets_settings(mine))  # type: ignore[arg-type]
    assert (mine / name).read_bytes() == (work / name).read_bytes()
    check_index(mine / "shards", ShardCache(tmp_path / "cache", 1 << 30))


def test_an_index_is_fetched_once_and_anew_when_it_changed(door: Door, work: Path, tmp_path: Path) -> None:
    """For the check, for both splits, and for whoever comes later on this machine."""
    mine, cache = Url("s3://corpus/indexed"), ShardCache(tmp_path, 1 << 30)

    def fetched() -> int:
        door.asked.clear()
        check_index(mine, cache)
        for split in SPLITS:
            assert load(mine, split, cache).table.equals(load(work / "shards", split).table)
        return door.asked.count(("GET", "/corpus/indexed/index.parquet"))

    for name in (INDEX_NAME, SUMS_NAME):
        upload(work / "shards" / name, mine / name)
    assert (fetched(), fetched()) == (1, 0)
    (kept,) = tmp_path.glob("*.parquet")
    kept.write_bytes(b"another index, or what is left of this one")
    assert (fetched(), fetched()) == (1, 0)
    upload(work / PLAN_NAME, mine / INDEX_NAME)
    kept.unlink()
    with pytest.raises(ShardError, match=r"index\.parquet"):
        load(mine, "train", cache)


def test_a_recording_is_fetched_once_for_all_of_a_shard(door: Door, remote: Url, work: Path) -> None:
    """Its content is known again, it is surveyed, and heard at two rates."""
    mine = Url("s3://corpus/work_once")
    shard_codes(codes_settings(remote / "files", mine))
    plan = Plan(work / PLAN_NAME)
    shards = (plan.rows(number) for number in range(len(plan.shards)))
    expected = Counter(id for rows in shards for id in {row["recording"] for row in rows if row["status"] == OK})
    door.asked.clear()
    shard_targets(targets_settings(mine))  # type: ignore[arg-type]
    fetched = Counter(path.partition("/files/")[2] for method, path in door.asked)
    assert {id: n for id, n in fetched.items() if id} == expected, "its size is known"


def test_a_file_of_many_stretches_is_fetched_once_for_a_pass(door: Door, tmp_path: Path) -> None:
    """To be planned, for its codes, and for its targets."""
    lines = ["path,start,end,speaker"]
    for name in ("a.ogg", "b.wav"):
        soundfile.write(tmp_path / name, speechlike(6, 24_000, 0), 24_000)
        upload(tmp_path / name, Url("s3://corpus/long") / name)
        lines += [f"s3://corpus/long/{name},{n},{n + 1},{name}" for n in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    door.asked.clear()
    shard_codes(codes_settings(tmp_path / "list.csv", tmp_path / "work", "segments_per_shard=100"))
    shard_targets(targets_settings(tmp_path / "work"))
    fetched = Counter(path.rpartition("/")[2] for method, path in door.asked if method == "GET" and "/long/" in path)
    assert fetched == {"a.ogg": 4, "b.wav": 3}, "an Ogg is planned by its beginning and its end"


@pytest.mark.parametrize("blocks", [0, 2])
def test_an_outage_is_no_bad_recording(blocks: int, door: Door, remote: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run with one line, and nothing is written of it; also when it begins in the middle of a file."""
    mine = Url(f"s3://corpus/work_outage_{blocks}")
    shard_codes(codes_settings(remote / "files", mine))
    if blocks:
        monkeypatch.setattr(storage, "WHOLE_BYTES", 1000)
        monkeypatch.setattr(storage, "BLOCK_BYTES", 50_000)
    asked = iter(range(1_000_000))
    door.fault = lambda method, path: (
        "error" if method == "GET" and path.endswith(".wav") and next(asked) >= blocks else None
    )
    refused(targets_words(mine), "planted (5 attempts in ")  # type: ignore[arg-type]
    door.fault = lambda method, path: None
    assert not [url for url in (mine / "shards").files() if url.suffix in (".tar", ".tmp")]


def test_a_bucket_that_is_not_there_is_one_line(door: Door, tmp_path: Path) -> None:
    refused(targets_words(Url("s3://nowhere/work")), "run `just shard-codes` first")  # type: ignore[arg-type]


def test_verify_reads_the_bucket_itself(
    door: Door, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing, damaged or there without being listed, whatever copies a cache holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    far = uploaded(work / "shards", Url("s3://corpus/verified"))
    settings = VerifySettings(shards=far, threads=2)
    verify(settings)
    assert "4 shards are whole" in capsys.readouterr().out

    index = load(far, "train")  # a copy of it is in the cache
    row = index.table.slice(0, 1).to_pylist()[0]
    damaged = bytearray((work / "shards" / "train" / "000000.tar").read_bytes())
    damaged[row["offset"] + 700] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    for name in ("train/000000.tar", "train/000077.tar"):
        upload(tmp_path / "damaged", far / name)
    (far / "train/000001.tar").unlink()
    with pytest.raises(ShardError, match=r"4 problem\(s\) in 4 shards"):
        verify(settings)
    assert capsys.readouterr().out.splitlines() == [
        f"{far}/train/000000.tar: its sha256 is not the sidecar's",
        f"{far}/train/000000.tar: {row['key']}: crc32 differs",
        f"{far}/train/000001.tar: missing",
        f"{far}/train/000077.tar: not in the index: run `just shard-targets` to its end",
    ]

    whole = bytearray((far / INDEX_NAME).read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(whole)
    upload(tmp_path / "damaged", far / INDEX_NAME)
    check_index(far)  # by the copy
    with pytest.raises(ShardError, match="its sha256 is not that of SHA256SUMS"):
        verify(settings)


def test_shards_of_a_bucket_are_judged(door: Door, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips and the report's counts, without a plan beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    far = uploaded(work / "shards", Url("s3://corpus/judged/shards"))
    name = load_snac(TINY_SNAC)[1].describe()
    here, there = ShardClips(work / "shards", name), ShardClips(far, name)
    assert there.title == "Validation segments of judged"
    assert there.entries == here.entries
    for place in range(len(here.entries)):
        np.testing.assert_array_equal(there.load(place).target, here.load(place).target)
    assert read_targets(far).statuses == read_targets(work / "shards").statuses
