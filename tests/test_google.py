"""Google's storage does what a disk does, whatever it answers on the way; as tests/test_storage.py has it of S3."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards import storage
from shards.storage import StorageError, Url
from shards.writer import read_footer
from tests import gs_server
from tests.gs_server import Bucket
from tests.test_storage import BYTES, Every, put, write_half

FAULTS = (429, 500, 503, "cut", "reset")
FOLDER = Url("gs://corpus/a folder")


@pytest.fixture(scope="module")
def google() -> Iterator[Bucket]:
    with gs_server.serving() as bucket:
        yield bucket


@pytest.fixture
def bucket(google: Bucket, impatient: None) -> Iterator[Bucket]:
    google.objects.clear()
    google.asked.clear()
    yield google
    google.fault = lambda method, path: None


def test_what_is_written_can_be_read(bucket: Bucket, tmp_path: Path) -> None:
    url = put(FOLDER / "deep" / "ä b.bin")
    assert bucket.objects == {"a folder/deep/ä b.bin": BYTES}
    assert (url.exists(), url.is_file(), FOLDER.is_dir(), url.is_dir()) == (True, True, True, False)
    assert url.stat().st_size == len(BYTES)
    tag = url.stat().tag
    assert tag
    assert (url.read_bytes(5, 9), url.read_bytes(-8), url.read_bytes()) == (BYTES[5:9], BYTES[-8:], BYTES)
    assert (url.read_bytes(len(BYTES), len(BYTES) + 1), put(FOLDER / "empty", b"").read_bytes(-8)) == (b"", b"")
    url.fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert put(url, BYTES[::-1]).stat().tag != tag
    url.unlink()
    url.unlink(missing_ok=True)
    assert not url.exists()
    assert read_footer(url) is None


def test_a_server_that_never_answers_is_an_outage(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url, over = put(FOLDER / "a.bin"), threading.Event()
    monkeypatch.setattr(storage, "SILENCE_SECONDS", 0.05)
    bucket.fault = lambda method, path: 503 if over.wait() else None
    try:
        with pytest.raises(StorageError, match=rf"a\.bin: .*\({storage.ATTEMPTS} attempts in"):
            url.read_bytes()
    finally:
        over.set()


def test_a_list_of_several_pages(bucket: Bucket) -> None:
    """In the order of their bytes, whatever other names begin alike."""
    names = ["train/000000.tar", "train/000000.parquet", "train-2/a.tar", "train.tar", "train/é.tar", "train/a/b", "Z"]
    bucket.objects = {f"c/{name}": name.encode() for name in names} | {"c-2/d": b"", "c": b"", "b/e": b""}
    folder = Url("gs://corpus/c")
    assert {url.text: size for url, size in folder.files().items()} == {
        f"{folder}/{name}": len(name.encode()) for name in names
    }
    assert {url.name for url in (folder / "train").files()} == {"000000.tar", "000000.parquet", "é.tar", "b"}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("methods", [("GET",), ("GET", "POST", "DELETE")])
def test_answers_that_fail_now_and_then_cost_time_only(
    kind: str | int, methods: tuple[str, ...], bucket: Bucket, tmp_path: Path
) -> None:
    bucket.fault = Every(kind, *methods)  # type: ignore[arg-type]
    url = put(FOLDER / "a.bin")
    assert url.read_bytes() == BYTES
    url.fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert FOLDER.files() == {url: len(BYTES)}
    url.unlink(missing_ok=True)  # the answer that it went may have failed
    assert not bucket.objects


@pytest.mark.parametrize("kind", FAULTS)
def test_an_outage_longer_than_the_clients_patience(
    kind: str | int,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It asks 36 times, and then deletes what it was to write to. That takes minutes, so the wait is said soon."""
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    clock = count(0, 100)
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=clock.__next__, sleep=lambda seconds: None))
    url = put(FOLDER / "a.bin")
    failures = iter(range(150))
    bucket.fault = lambda method, path: kind if "/download/" in path and next(failures, None) is not None else None
    url.fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert capsys.readouterr().out.endswith(": trying for 10 minutes; Ctrl-C ends it\n")
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.parametrize("kind", FAULTS)
def test_an_object_in_chunks_is_whole(kind: str | int, bucket: Bucket) -> None:
    """Where its upload is not begun, or a chunk or its answer is lost."""
    data = random.Random(0).randbytes(6 << 20)
    faults = [kind, None, kind]
    bucket.fault = lambda method, path: faults.pop() if method == "POST" and faults else None
    assert put(FOLDER / "a.bin", data).read_bytes() == data
    assert not faults


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_that_keeps_failing_is_named(
    kind: str | int, bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = put(FOLDER / "a.bin")
    bucket.fault = lambda method, path: kind
    for action in (lambda: url.fetch(tmp_path / "a.bin"), url.read_bytes, url.exists, FOLDER.files, lambda: put(url)):
        with pytest.raises(StorageError, match=rf"{url.parent}.*\({storage.ATTEMPTS} attempts in"):
            action()
    assert not list(tmp_path.iterdir())
    assert not caplog.records


@pytest.mark.parametrize(("status", "said"), [(401, storage.EXPIRED), (403, storage.DENIED)])
def test_a_refusal_says_a_way_out(
    status: int, said: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is not waited for."""
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    url = put(FOLDER / "a.bin")
    bucket.fault = lambda method, path: status
    for action in (url.read_bytes, url.exists, FOLDER.files, lambda: put(url)):
        with pytest.raises(StorageError, match=re.escape(said)):
            action()
    asked = len(bucket.asked)
    with pytest.raises(StorageError):
        url.read_bytes()
    assert len(bucket.asked) - asked <= 6, "the client's own attempts, half a minute long"
    assert not caplog.records


def test_an_error_while_writing_leaves_the_old_object(bucket: Bucket) -> None:
    url = put(FOLDER / "a.bin", b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(url)
    assert bucket.objects == {"a folder/a.bin": b"old"}


def test_nothing_is_asked_by_grpc(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kind of bucket it is: where that may not be asked, each action would be warned of."""
    monkeypatch.delenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
    assert not FOLDER.exists()
    assert os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
