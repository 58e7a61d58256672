"""Buckets as people have them: names that no disk would hold, and what is archived, refused or gone."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import boto3
import pytest
import soundfile

from configs.loader import load_settings
from pipeline.codes import shard_codes
from pipeline.plan import make_plan
from pipeline.settings import VerifySettings
from pipeline.sources import find
from pipeline.targets import shard_targets
from shards.errors import SettingsError, ShardError, UserError
from shards.storage import StorageError, Url
from shards.writer import read_footer
from tests.command_helpers import in_process, refused, rows_of
from tests.helpers import codes_settings, codes_words, speechlike, targets_settings
from tests.s3_server import Door

KEYS = (
    *("a b.wav", "a+b.wav", "100%.wav", "a%2Fb.wav", "x#y.wav", "x?y=1&z.wav", "é.wav", "e\u0301.wav", "日本/語.wav"),
    *(
        "d//e.wav",
        "/f.wav",
        "./g.wav",
        "h/../i.wav",
        "back\\slash.wav",
        "tab\t.wav",
        " lead.wav",
        "q\"'.wav",
        "<&amp;>.wav",
    ),
    *("a/b.wav", "c.wav/d.wav", f"{200 * 'n'}/{800 * 'm'}.wav"),
)


def wav(seed: int, seconds: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, speechlike(seconds, 24_000, seed), 24_000, format="WAV")
    return buffer.getvalue()


def fill(door: Door, objects: dict[str, bytes]) -> None:
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{door.behind}")
    for key, data in objects.items():
        client.put_object(Bucket="corpus", Key=key, Body=data)


def takes(door: Door, folder: str, count: int = 4) -> Url:
    fill(door, {f"{folder}/speaker_{n % 4}/{n}.wav": wav(n) for n in range(count)})
    return Url(f"s3://corpus/{folder}")


def test_names_of_any_kind(door: Door, tmp_path: Path) -> None:
    """Each is found once, under its name, and read; markers of folders are said."""
    objects = {key: wav(n) for n, key in enumerate(KEYS)} | {"a": b""}
    folder = Url("s3://corpus/names")
    fill(door, {f"names/{key}": data for key, data in {**objects, "a/": b"", "": b"", "c.wav/": b"some"}.items()})
    assert {url.text[len(f"{folder}/") :]: url.read_bytes() for url in folder.files() if url.name} == objects
    found, ignored = find(folder, None)
    assert sorted(found["recording"].to_pylist()) == sorted(KEYS)
    assert ignored == {"a": 1, "folder marker": 2, "c.wav/ (a folder's name)": 1}
    shard_codes(codes_settings(folder, tmp_path / "work"))
    rows = rows_of(tmp_path / "work" / "codes")
    assert rows.keys() == {*KEYS}
    assert {row["status"] for of_one in rows.values() for row in of_one} <= {"ok", "too_short"}


def test_an_object_with_the_name_of_a_folder(door: Door, tmp_path: Path) -> None:
    """As programs leave that show a bucket as a disk."""
    folder = takes(door, "marked")
    settings = codes_settings(folder, tmp_path)
    fill(door, {"marked": b""})
    assert len(find(folder, None)[0]) == 4
    make_plan(settings)
    fill(door, {"marked/speaker_0/later.wav": wav(9)})
    with pytest.raises(UserError, match=r"1 recordings such as 'speaker_0/later\.wav' were added"):
        make_plan(settings)
    with pytest.raises(UserError, match=r"0\.wav is neither a folder nor a manifest"):
        find(folder / "speaker_0/0.wav", None)


@pytest.mark.parametrize(
    "text", ["s3:/corpus/work", "s3:///corpus/work", "s3://corpus//work", "s3://corpus/./work", "s3://corpus/a/../work"]
)
def test_spellings_that_lead_elsewhere(text: str, tmp_path: Path) -> None:
    """To a folder called s3: on this machine, or to names that no other spelling finds."""
    with pytest.raises(SettingsError, match="s3://bucket/folder"):
        load_settings(VerifySettings, "verify.json", [f"shards={text}"])
    assert not Path("s3:").exists()


def test_what_is_gone_from_a_bucket_is_a_reason(door: Door, tmp_path: Path) -> None:
    folder = takes(door, "gone")
    settings = codes_settings(folder, tmp_path, "max_failed_fraction=1")
    make_plan(settings)
    (folder / "speaker_1/1.wav").unlink()
    shard_codes(settings)
    rows = rows_of(tmp_path / "codes")
    assert {row["reason"] for row in rows["speaker_1/1.wav"]} == {"no such object since planning"}
    assert {row["status"] for id in rows.keys() - {"speaker_1/1.wav"} for row in rows[id]} == {"ok"}


def test_what_is_archived_is_a_reason(door: Door, tmp_path: Path) -> None:
    """Until it is restored: HEAD and the list show it all the same."""
    words = codes_words(takes(door, "archived"), tmp_path, "max_failed_fraction=1")

    def run_without(*archived: str) -> dict[str, str]:
        door.fault = lambda method, path: "archived" if method == "GET" and path.endswith(archived) else None
        assert in_process(words).exit_code == 0
        return {id: rows[0]["reason"] for id, rows in rows_of(tmp_path / "codes").items()}

    assert run_without("0.wav")["speaker_0/0.wav"] == "not readable as audio: archived (restore it first)"
    for path in (tmp_path / "codes").glob("*/*.parquet"):
        path.unlink()
    assert run_without("1.wav")["speaker_1/1.wav"] == "archived (restore it first) since planning"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("expired", "have the credentials expired?"),
        ("denied", "do the credentials allow it?"),
        ("moved", "AWS_ENDPOINT_URL"),
    ],
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_refusal_says_a_way_out(kind: str, said: str, method: str, door: Door, tmp_path: Path) -> None:
    folder = takes(door, "refused")
    door.fault = lambda asked, path: kind if asked == method else None
    refused(codes_words(folder, tmp_path), said)


def test_another_region_is_named(door: Door) -> None:
    fill(door, {"region/a": b"abc"})
    door.fault = lambda method, _: "elsewhere" if method == "GET" else None
    with pytest.raises(StorageError, match=r"AuthorizationHeaderMalformed: .*; the bucket is in another region"):
        Url("s3://corpus/region/a").read_bytes()


def test_no_bucket_is_no_object(door: Door) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such bucket: 's3://nowhere/a'"):
        Url("s3://nowhere/a").read_bytes()


def test_there_is_nothing_behind_the_end(door: Door) -> None:
    """Of an object that is empty, or shorter by now: a disk gives no bytes, the protocol an error."""
    fill(door, {"ends/empty": b"", "ends/short": b"abc"})
    empty, short = Url("s3://corpus/ends/empty"), Url("s3://corpus/ends/short")
    assert (empty.read_bytes(), empty.read_bytes(-8), short.read_bytes(3, 9)) == (b"", b"", b"")
    with pytest.raises(ShardError, match="damaged, or no file of ours"):
        read_footer(empty)


def test_what_a_shard_costs_to_write(door: Door) -> None:
    """Four uploads, each asked for its size; and a sidecar that is whole before the tar is takes its name later."""
    folder, work = takes(door, "cost"), Url("s3://corpus/cost_work")
    settings = codes_settings(folder, work, "segments_per_shard=2")
    door.asked.clear()
    shard_codes(settings)
    planned = len([path for _, path in door.asked if path.endswith("/plan.parquet")])
    shard_targets(targets_settings(work))  # type: ignore[arg-type]
    assert len([path for _, path in door.asked if path.endswith("/plan.parquet")]) == planned + 2, "HEAD and GET"
    shards = len(make_plan(settings).shards)
    asked = Counter((method, path.partition(".")[2]) for method, path in door.asked if re.search(r"/\d{6}\.", path))
    written = {pair: n / shards for pair, n in asked.items() if pair[0] != "GET"}
    one = dict.fromkeys([("PUT", "tar"), ("HEAD", "tar"), ("PUT", "parquet.next"), ("HEAD", "parquet.next")], 1)
    assert written == {**one, ("PUT", "parquet"): 2, ("HEAD", "parquet"): 2, ("DELETE", "parquet.next"): 1}
    assert not [path for _, path in door.asked if re.search(r"list-type=.*\d{6}\.", path)]


def test_paths_of_a_manifest_are_relative_to_its_folder(door: Door, tmp_path: Path) -> None:
    """As on a disk, where a bucket would take . and .. as names; and they lead to no other bucket."""
    takes(door, "dots", 2)
    fill(door, {"dots/speaker_3//3.wav": wav(3)})
    names = ["./speaker_0/0.wav", "../dots/speaker_1/1.wav", "speaker_3//3.wav", "../../other/2.wav"]
    fill(door, {"dots/list.jsonl": "\n".join(json.dumps({"path": name}) for name in names).encode()})
    shard_codes(codes_settings(Url("s3://corpus/dots/list.jsonl"), tmp_path, "max_failed_fraction=1"))
    assert {id: rows[0]["reason"] for id, rows in rows_of(tmp_path / "codes").items()} == {
        **dict.fromkeys(names, None),
        "../../other/2.wav": "no such object",
    }
