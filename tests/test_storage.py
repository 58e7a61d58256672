"""Remote storage does what a disk does: whole objects or none, whatever the server answers on the way."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pytest

from shards import storage, writer
from shards.files import replacing
from shards.pieces import Part, nearby, skimmed
from shards.storage import StorageError, Url, locate
from shards.writer import read_footer, read_metadata, read_table, write_table
from tests.s3_server import Door

BYTES = bytes(range(256)) * 400


@pytest.fixture
def folder(door: Door, request: pytest.FixtureRequest) -> Url:
    return Url("s3://corpus") / hashlib.sha256(request.node.name.encode()).hexdigest()[:8]


def put(url: Url, data: bytes = BYTES) -> Url:
    with replacing(url) as temporary:
        temporary.write_bytes(data)
    return url


def write_half(url: Url) -> None:
    with replacing(url) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise KeyboardInterrupt


class Every:
    """A fault at every third matching request, from the first on."""

    def __init__(self, kind: str, *methods: str) -> None:
        self.kind, self.methods, self.count = kind, methods, 0

    def __call__(self, method: str, path: str) -> str | None:
        if method not in self.methods:
            return None
        self.count += 1
        return self.kind if self.count % 3 == 1 else None


def test_locations() -> None:
    assert locate("a/b") == Path("a/b")
    url = locate("s3://bucket/a/b.tar/")
    assert url == Url("s3://bucket/a/b.tar") == locate(url)
    assert (url.name, url.stem, url.suffix, str(url.parent)) == ("b.tar", "b", ".tar", "s3://bucket/a")
    assert str(url.with_suffix(".parquet")) == "s3://bucket/a/b.parquet"
    assert str(url.parent / "c") == "s3://bucket/a/c"


def test_what_is_written_can_be_read(folder: Url, tmp_path: Path) -> None:
    url = put(folder / "deep" / "a.bin")
    assert (url.exists(), url.is_file(), folder.is_dir(), url.is_dir()) == (True, True, True, False)
    assert url.stat().st_size == len(BYTES)
    assert url.read_bytes() == BYTES
    with url.open() as file:
        file.seek(100)
        assert file.read(3) == BYTES[100:103]
    url.fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    assert folder.files() == {url: len(BYTES)}
    put(url, b"other")
    assert url.read_bytes() == b"other"
    url.unlink()
    assert not url.exists()
    url.unlink(missing_ok=True)
    assert folder.files() == {}


def test_what_is_not_there(folder: Url, tmp_path: Path) -> None:
    for action in (Url.stat, Url.read_bytes, Url.open):
        with pytest.raises(FileNotFoundError, match=r"no such object.*gone"):
            action(folder / "gone")
    with pytest.raises(FileNotFoundError):
        (folder / "gone").fetch(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"nosuch://a/b: nosuch:// is none of s3, gs, hf"):
        Url("nosuch://a/b").exists()


@pytest.mark.parametrize("kind", ["error", "slow", "cut"])
@pytest.mark.parametrize("methods", [("GET", "HEAD"), ("PUT",), ("GET", "HEAD", "PUT", "DELETE", "POST")])
def test_answers_that_fail_now_and_then_cost_time_only(
    kind: str, methods: tuple[str, ...], folder: Url, door: Door, tmp_path: Path
) -> None:
    door.fault = Every(kind, *methods)
    url = put(folder / "a.bin")
    assert url.read_bytes() == BYTES
    url.fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BYTES
    door.fault = lambda method, path: None
    assert [found.name for found in folder.files() if not found.name.endswith(".tmp")] == ["a.bin"]
    assert url.read_bytes() == BYTES


def test_a_large_object_is_read_in_blocks(folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    url = put(folder / "a.bin")
    door.fault = Every("error", "GET")
    for file, expected in ((url.open(), BYTES), (Part(url, 1000, 90_000).open(), BYTES[1000:91_000])):
        with file:
            assert file.read() == expected
            file.seek(-10, io.SEEK_END)
            assert file.read(100) == expected[-10:]
    door.fault = lambda method, path: "error" if method == "GET" else None
    with url.open() as file, pytest.raises(StorageError, match=rf"{storage.ATTEMPTS} attempts"):
        file.read(1)


def test_what_is_skimmed_is_read_as_a_file(folder: Url, door: Door) -> None:
    """Wherever it is read, in whatever steps, through answers that fail."""
    rng = random.Random(0)
    data = rng.randbytes(100_000)
    url = put(folder / "a.bin", data)
    door.fault = Every("error", "GET")
    with skimmed(Part(url, 1000, 90_000)).open() as file:
        expected = io.BytesIO(data[1000:91_000])
        for _ in range(100):
            place, size = rng.randrange(95_000), rng.choice([1, 44, 512, 8192, 65_536])
            assert file.seek(place) == expected.seek(place)
            assert file.read(size) == expected.read(size)


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_server_that_keeps_failing_is_named(method: str, folder: Url, door: Door, tmp_path: Path) -> None:
    url = put(folder / "a.bin") if method == "GET" else folder / "a.bin"
    door.fault = lambda asked, path: "error" if asked == method else None
    with pytest.raises(StorageError, match=rf"{folder}/a.bin: .*\({storage.ATTEMPTS} attempts in"):
        put(url) if method == "PUT" else url.fetch(tmp_path / "a.bin")
    door.fault = lambda method, path: None
    assert url.exists() == (method == "GET")
    assert not (tmp_path / "a.bin").exists()


def test_an_outage_of_minutes_is_waited_for(
    folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And said once, however many wait."""
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    monkeypatch.setattr(storage, "LONGEST_WAIT_SECONDS", 0.01)
    url = put(folder / "a.bin")
    failures = iter(range(60))
    door.fault = lambda method, path: "error" if next(failures, None) is not None else None
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(Url.read_bytes, [url] * 4)) == [BYTES] * 4
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{url}: ")
    assert line.endswith(": trying for 10 minutes; Ctrl-C ends it")


@pytest.mark.parametrize(("kind", "failing"), [("error", storage.ATTEMPTS - 1), ("refused", 100)])
def test_no_wait_is_said_of_a_short_outage_or_a_slow_refusal(
    kind: str,
    failing: int,
    folder: Url,
    door: Door,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    clock = itertools.count(0, 0 if kind == "error" else 100)
    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=clock.__next__, sleep=lambda seconds: None))
    url, failures = put(folder / "a.bin"), iter(range(failing))
    door.fault = lambda method, path: kind if next(failures, None) is not None else None
    with suppress(StorageError):
        url.read_bytes()
    assert capsys.readouterr().out == ""


def test_an_object_of_another_size_than_told_is_said_once(
    folder: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(folder / "a.bin")
    monkeypatch.setattr(Url, "stat", lambda self: storage.Stat(len(BYTES) + 1))
    told = f"{url}: {len(BYTES)} of {len(BYTES) + 1} bytes were fetched to {tmp_path / 'a.bin'}; try again"
    with pytest.raises(StorageError, match=f"^{re.escape(told)}$"):
        url.fetch(tmp_path / "a.bin")


def test_an_outage_beyond_patience_is_an_error(folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(storage, "LONGEST_WAIT_SECONDS", 0.01)
    url, failures = put(folder / "a.bin"), iter(range(1000))  # far more than there is patience for
    door.fault = lambda method, path: "error" if next(failures, None) is not None else None
    with pytest.raises(StorageError, match=rf"{url}: .* attempts in"):
        url.read_bytes()


@pytest.mark.parametrize(("kind", "attempts"), [("refused", storage.ATTEMPTS), ("denied", 1)])
def test_what_is_refused_is_not_waited_for(
    kind: str, attempts: int, folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    url = put(folder / "a.bin")
    door.fault = lambda method, path: kind
    for action in (Url.read_bytes, Url.exists):
        with pytest.raises(StorageError, match=rf"\({attempts} attempts in \d+ s\)"):
            action(url)


def test_without_credentials_nothing_is_waited_for(folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 600)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(StorageError, match="redentials"):
        (folder / "a.bin").read_bytes()
    fsspec.filesystem("s3").clear_instance_cache()


def test_an_error_while_writing_leaves_the_old_object(folder: Url) -> None:
    url = put(folder / "a.bin", b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(url)
    assert (url.read_bytes(), list(folder.files())) == (b"old", [url])


def test_what_is_written_costs_two_requests(folder: Url, door: Door) -> None:
    """The storage shows an object when it is whole; it is asked for its size."""
    door.asked.clear()
    put(folder / "a.bin")
    assert [method for method, _ in door.asked] == ["PUT", "HEAD"]


@pytest.mark.parametrize("fetched", [64, 1 << 16])
def test_tables(fetched: int, folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FOOTER_BYTES", fetched)
    table = pa.table({"a": [1, 2, 3]})
    write_table(folder / "a.parquet", table, {"made": {"by": "us"}})
    door.asked.clear()
    assert read_metadata(folder / "a.parquet") == {"made": {"by": "us"}}
    assert [method for method, _ in door.asked] == ["GET"] * (2 if fetched == 64 else 1)
    assert read_footer(folder / "b.parquet") is None
    assert read_table(folder / "a.parquet").equals(table.replace_schema_metadata({"made": '{"by": "us"}'}))
    assert read_table(folder / "a.parquet", columns=["a"]).column_names == ["a"]


@pytest.mark.parametrize("status", [401, 403, 408, 416, 429, 502, 503])
def test_when_google_is_waited_for(status: int) -> None:
    retry = pytest.importorskip("gcsfs.retry", reason="`just extras` installs it")
    with pytest.raises(Exception, match=r"^$|planted") as caught:
        retry.validate_response(status, b'{"error": {"message": "planted"}}', "corpus/a.bin")
    assert storage._is_outage(caught.value) == (status in (408, 429, 502, 503))
    assert (storage._answer(caught.value)[0] == 416) == (status == 416)
    assert (storage.DENIED in storage._reason(caught.value)) == (status == 403)


@pytest.mark.parametrize("kind", ["error", "cut"])
@pytest.mark.parametrize(("method", "step"), [("POST", "?uploads"), ("PUT", "partNumber=2"), ("POST", "?uploadId=")])
def test_an_object_in_parts_is_whole(
    kind: str, method: str, step: str, folder: Url, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its upload is not begun, a part fails, or the answer that all are joined."""
    part = 5 << 20  # the least that the protocol takes
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize: part)
    faults = [kind]
    door.fault = lambda asked, path: faults.pop() if asked == method and step in path and faults else None
    data = random.Random(0).randbytes(2 * part + 1)
    assert put(folder / "a.bin", data).read_bytes() == data
    assert not faults


def test_what_a_killed_process_leaves_here_has_our_name(folder: Url) -> None:
    put(folder / "a.bin")
    with replacing(folder / "b.bin") as temporary, nearby(folder / "a.bin") as local:
        temporary.touch()
        assert {path.parent.name[:7] for path in (temporary, local)} == {"snac48."}
