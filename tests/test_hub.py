"""What comes from the hub and goes there, by the hub's own client, through a server of its protocol."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from snac import SNAC

from codec import weights
from pipeline.codes import shard_codes
from shards import hub as of_the_hub
from shards import storage
from shards.contract import INDEX_NAME, SPLITS, SUMS_NAME
from shards.index import load
from shards.reader import read_sample
from shards.storage import Location, StorageError, Url
from tests.command_helpers import in_process, refused, rows_of
from tests.helpers import TINY_SNAC, codes_settings
from tests.hub_server import Hub, Repository
from tests.test_tars import write_tars
from tests.training_helpers import call

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own
WEIGHTS = "pytorch_model.bin"


def listings(hub: Hub) -> int:
    return sum("/tree/" in path for _, path in hub.asked)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0)


@pytest.fixture
def prefetch(hub: Hub, tmp_path: Path) -> list[str]:
    """The command, where the hub has a SNAC and all that is published of it is pinned."""
    files = hub.holds("models/someone/snac", Path(TINY_SNAC)).files("0")
    found = {name: hashlib.sha256(files[name]).hexdigest() for name in ("config.json", WEIGHTS)}
    (tmp_path / "pins.json").write_text(json.dumps({"someone/snac": {"revision": f"{0:040d}", "files": found}}))
    return ["prefetch", f"weights={tmp_path / 'pins.json'}"]


def test_prefetch_fetches_and_checks_once(hub: Hub, prefetch: list[str]) -> None:
    first = in_process(prefetch).output.splitlines()
    for file in ("config.json", WEIGHTS):  # said before it takes its time
        begun = first.index(f"fetching {file} of someone/snac from the hub")
        assert first[begun + 1].startswith(f"ok   someone/snac/{file}")
    assert hub.sent == Path(TINY_SNAC, WEIGHTS).stat().st_size
    asked = len(hub.asked)
    again = in_process(prefetch)
    assert again.exit_code == 0
    assert "from the hub" not in again.output
    assert len(hub.asked) == asked


def test_an_answer_that_is_cut_short_is_fetched_to_its_end(hub: Hub, prefetch: list[str]) -> None:
    cut = iter([True])
    hub.fault = lambda _, path: "cut" if path.startswith("/stored") and next(cut, False) else None
    assert in_process(prefetch).exit_code == 0
    assert next(cut, None) is None


@pytest.mark.parametrize("status", [401, 403])
def test_why_the_hub_gives_no_file_is_said(status: int, hub: Hub, prefetch: list[str]) -> None:
    """A repository may ask for a licence to be accepted, or a token may have expired."""
    hub.fault = lambda *_: status
    result = in_process(prefetch)
    assert result.exit_code == 1
    assert re.search(rf"error: someone/snac .*{status} .*planted.*signed in if it asks .*hf auth login", result.stderr)


def test_the_way_out_of_a_damaged_copy_is_one(hub: Hub, prefetch: list[str]) -> None:
    """What the message names is what the client keeps, and not a link to it."""
    whole = dict(hub.stored)
    hub.stored = {digest: bytes(len(data)) for digest, data in whole.items()}
    said = in_process(prefetch).output
    assert "the file is damaged or another one. Delete it and fetch it again" in said
    hub.stored = whole
    assert in_process(prefetch).exit_code == 1
    Path(re.search(rf"FAIL someone/snac/{WEIGHTS}: (\S+): sha256", said)[1]).unlink()  # type: ignore[index]
    weights._sha256.cache_clear()  # as in another process
    assert in_process(prefetch).exit_code == 0


def test_shards_come_back_as_they_went(hub: Hub, shards: Path) -> None:
    assert in_process(["push-shards", f"shards={shards}", "repo=me/corpus"]).exit_code == 0
    there = hub.repositories["datasets/me/corpus"].files("main")
    assert {name: data for name, data in there.items() if name != "README.md"} == {
        str(path.relative_to(shards)): path.read_bytes()
        for path in shards.rglob("*")
        if path.name in (INDEX_NAME, SUMS_NAME) or path.parent.name in SPLITS
    }
    index = load(Url("hf://datasets/me/corpus"), "train")
    local = load(shards, "train")
    for number in range(len(index)):
        assert {**read_sample(index, number), "__url__": ""} == {**read_sample(local, number), "__url__": ""}


def test_why_an_upload_fails_is_said(hub: Hub, shards: Path) -> None:
    hub.fault = lambda method, _: 403 if method == "PUT" else None
    refused(
        ["push-shards", f"shards={shards}", "repo=me/corpus"],
        "to the Hub. from HfHubHTTPError: 403 Forbidden: planted.",
    )


def test_no_index_goes_where_shards_are_ignored(hub: Hub, shards: Path) -> None:
    """As a repository's own .gitignore may say; the client leaves such files out and tells nobody."""
    hub.fault = lambda method, path: "ignored" if method == "IGNORE" and path.endswith(".tar") else None
    count = len(list(shards.glob("*/*.tar")))
    refused(
        ["push-shards", f"shards={shards}", "repo=me/corpus"],
        f"me/corpus did not keep train/000000.tar ({count} such): see its .gitignore",
    )
    assert INDEX_NAME not in hub.repositories["datasets/me/corpus"].files("main")


def test_an_export_comes_back_through_the_stock_package(hub: Hub, untrained: Path, tmp_path: Path) -> None:
    assert call("export", f"model={untrained}", f"out={tmp_path / 'export'}")[0] == 0
    assert call("push", f"model={tmp_path / 'export'}", "repo=me/snac_48khz")[0] == 0
    pushed, local = SNAC.from_pretrained("me/snac_48khz").state_dict(), SNAC.from_pretrained(str(tmp_path / "export"))
    assert pushed.keys() == local.state_dict().keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.state_dict().items())


def test_an_export_that_the_repository_ignores_is_not_published(hub: Hub, untrained: Path, tmp_path: Path) -> None:
    assert call("export", f"model={untrained}", f"out={tmp_path / 'export'}")[0] == 0
    hub.fault = lambda method, path: "ignored" if method == "IGNORE" and path == WEIGHTS else None
    code, output = call("push", f"model={tmp_path / 'export'}", "repo=me/snac_48khz")
    assert (code, f"me/snac_48khz did not keep {WEIGHTS}" in output) == (1, True)


def test_recordings_at_the_hub_give_the_codes_of_a_folder(hub: Hub, recordings: Path, tmp_path: Path) -> None:
    """Which is listed once, not once for each of its recordings."""
    hub.holds("datasets/me/voices", recordings)
    places: dict[str, Location] = {"here": recordings, "there": Url("hf://datasets/me/voices")}
    for name, audio in places.items():
        shard_codes(codes_settings(audio, tmp_path / name, "threads=1"))
    assert rows_of(tmp_path / "there" / "codes") == rows_of(tmp_path / "here" / "codes")
    assert listings(hub) == 1
    assert hub.sent < 1.5 * sum(path.stat().st_size for path in recordings.glob("*/*.wav"))


def test_threads_share_what_was_listed(hub: Hub, recordings: Path) -> None:
    hub.holds("datasets/me/voices", recordings)
    with ThreadPoolExecutor(1) as another:
        found = another.submit(Url("hf://datasets/me/voices").files).result()
    assert {url: url.stat().st_size for url in found} == found
    assert listings(hub) == 1


def test_of_a_tar_at_the_hub_no_more_is_fetched_than_is_read(hub: Hub, recordings: Path, tmp_path: Path) -> None:
    tars = write_tars(recordings, tmp_path / "tars")
    hub.holds("datasets/me/tars", tars)
    shard_codes(codes_settings(Url("hf://datasets/me/tars"), tmp_path / "work", "threads=1"))
    assert hub.sent < 2.5 * sum(path.stat().st_size for path in tars.iterdir())


def test_who_may_not_see_a_repository_learns_how(hub: Hub, tmp_path: Path) -> None:
    words = ["shard-codes", "audio=hf://datasets/me/none/in", f"work={tmp_path / 'work'}", "gpu=cpu"]
    refused([*words, f"pretrained_model={TINY_SNAC}"], "no such repository, or not for you to read: `hf auth login`")


def test_a_bucket_is_listed_once(hub: Hub, recordings: Path, tmp_path: Path) -> None:
    """Of a tar in it, other bytes are another version."""
    hub.holds("buckets/me/voices", recordings)
    shard_codes(codes_settings(Url("hf://buckets/me/voices"), tmp_path / "work", "threads=1"))
    listed = [path for _, path in hub.asked if "/tree" in path]
    assert len(listed) == len(set(listed))
    recording = next(recordings.glob("*/*.wav"))
    url = Url("hf://buckets/me/voices") / recording.relative_to(recordings).as_posix()
    assert url.stat().tag == hashlib.sha256(recording.read_bytes()).hexdigest()


def test_a_branch_that_is_not_there_is_not_a_matter_of_who_asks(hub: Hub, tmp_path: Path) -> None:
    hub.holds("datasets/me/voices", tmp_path)
    with pytest.raises(StorageError, match=r"no such branch, tag or commit there \(in its name, write / as %2F\)"):
        Url("hf://datasets/me/voices@none").exists()


@pytest.mark.usefixtures("impatient")
def test_an_answer_of_another_length_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    """Of a proxy that ignores ranges, or of a login page; what is whole is what was asked for."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(bytes(range(100)))
    hub.holds("datasets/me/voices", tmp_path / "in")
    url = Url("hf://datasets/me/voices/a.wav")
    hub.fault = lambda _, path: "whole" if path.startswith("/stored") else None
    assert url.read_bytes(0, 100) == bytes(range(100))
    for start, stop in ((10, 20), (0, 20), (-10, None)):
        with pytest.raises(StorageError, match="0 bytes were asked for, and 100 came, as from a proxy"):
            url.read_bytes(start, stop)
    hub.fault = lambda _, path: "page" if "/resolve/" in path else None
    for stop in (100, 10, None):
        with pytest.raises(StorageError, match="0 bytes were asked for, and 19 came, as from a proxy"):
            url.read_bytes(0, stop)
    hub.fault = lambda *_: "page"
    of_the_hub._commit.cache_clear()
    with pytest.raises(StorageError, match="the answer is not JSON, as from a proxy or a login page"):
        url.read_bytes()


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_never_comes_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.repositories["datasets/me/voices"] = Repository()
    hub.fault = lambda _, path: "never" if "/revision/" in path else None
    with pytest.raises(StorageError, match="timed out"):
        Url("hf://datasets/me/voices").exists()


def test_a_process_reads_the_hub_as_it_first_found_it(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("before")
    repository, url = hub.holds("datasets/me/voices", tmp_path / "in"), Url("hf://datasets/me/voices/a.txt")
    assert url.read_bytes() == b"before"
    repository.commits.append({"a.txt": b"pushed meanwhile"})
    assert (url.read_bytes(), url.stat().st_size) == (b"before", 6)
    of_the_hub._commit.cache_clear()  # as in another process
    assert (url.read_bytes(), url.stat().st_size) == (b"pushed meanwhile", 16)
    assert Url(f"hf://datasets/me/voices@{0:040d}/a.txt").read_bytes() == b"before"
