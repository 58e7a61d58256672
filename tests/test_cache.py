"""Remote shards are fetched whole, once, ahead of their time, into a folder that keeps its bound."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from shards.cache import CacheError, ShardCache, default_cache
from shards.contract import tar_path
from shards.errors import ShardError
from shards.index import load
from shards.order import Order
from shards.reader import read_sample
from shards.storage import Location, Url
from shards.stream import Stage, Stream, StreamSource
from tests.helpers import no_such_user
from tests.test_stream import STREAMS
from tests.training_helpers import assert_same_state, small_training
from trainer.data import training_batches

MANY = 1 << 30


@pytest.fixture(autouse=True)
def folders_may_be_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.storage.SCHEMES", ("file",))


def remote(folder: Path) -> Url:
    return Url(f"file://{folder}")


def shard_of(folder: Path, name: str, size: int = 1000) -> Url:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.tar").write_bytes(name.encode() * size)
    return remote(folder) / f"{name}.tar"


def test_a_user_without_a_home_keeps_shards_beside_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache().folder == tmp_path / ".cache" / "snac48" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert default_cache().folder == tmp_path / "mine" / "snac48" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    assert default_cache().folder == Path(gettempdir()) / "snac48" / "shards"


def test_a_cache_that_cannot_be_made_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shard = shard_of(tmp_path / "far", "a")
    with pytest.raises(CacheError, match=r"cannot be made \(Not a directory: .*\): name another cache="):
        ShardCache(tmp_path / "file" / "shards", MANY).open(shard)


def read(cache: ShardCache, shard: Location) -> bytes:
    with cache.open(shard) as file:
        return file.read()


def held(cache: ShardCache) -> list[str]:
    return sorted(path.read_bytes()[:1].decode() for path in cache.folder.glob("*.tar"))


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    fetched: list[str] = []
    original = Url.fetch

    def fetch(self: Url, path: Path) -> None:
        fetched.append(self.name)
        original(self, path)

    monkeypatch.setattr(Url, "fetch", fetch)
    return fetched


def test_a_shard_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, fetched = ShardCache(tmp_path / "cache", MANY), count_fetches(monkeypatch)
    shard = shard_of(tmp_path / "far", "a")
    for _ in range(3):
        assert read(cache, shard) == b"a" * 1000
    assert fetched == ["a.tar"]
    assert read(cache, tmp_path / "far" / "a.tar") == b"a" * 1000
    assert held(cache) == ["a"]


def test_the_least_recently_read_goes_and_what_is_wanted_stays(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3000)
    a, b, c, d = (shard_of(tmp_path / "far", name) for name in "abcd")
    for shard in (a, b, c, a):
        read(cache, shard)
    assert held(cache) == ["a", "b", "c"]
    read(cache, d)
    assert held(cache) == ["a", "c", "d"]
    cache.wanted = (a, c, b)
    read(cache, b)
    assert held(cache) == ["a", "b", "c"]
    with pytest.raises(CacheError, match=r"cache_gib allows .*: allow more, or take fewer window_shards"):
        read(cache, d)
    assert held(cache) == ["a", "b", "c"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_what_is_not_wanted_makes_room(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk holds two shards, and the limit is far above it."""
    cache, tried = ShardCache(tmp_path / "cache", MANY), list[str]()
    get_file = LocalFileSystem.get_file

    def on_a_small_disk(self: LocalFileSystem, name: str, path: str) -> None:
        tried.append(Path(name).stem)
        if len(held(cache)) == 2:
            raise OSError(error, os.strerror(error))
        get_file(self, name, path)

    monkeypatch.setattr(LocalFileSystem, "get_file", on_a_small_disk)
    a, b, c, d = (shard_of(tmp_path / "far", name) for name in "abcd")
    for shard in (a, b):
        read(cache, shard)
    os.utime(cache._path(b), (0, 0))
    assert read(cache, c) == b"c" * 1000
    assert held(cache) == ["a", "c"]
    cache.wanted = (a, c)
    expected = (
        rf"cache={cache.folder}: {os.strerror(error)} for the 0.00 GiB of .*d\.tar.* name a cache= on another disk"
    )
    with pytest.raises(CacheError, match=expected):
        read(cache, d)
    assert held(cache) == ["a", "c"]
    assert tried == ["a", "b", "c", "c", "d"], "trying again frees no disk"


def test_a_cache_that_cannot_be_locked_is_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path / "cache", MANY)
    index = load(remote(work / "shards"), "train", cache)

    def none(lock: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(CacheError, match=f"cache={cache.folder} cannot be locked .No locks available.*local disk"):
        read_sample(index, 0)


def test_what_a_killed_process_had_fetched_goes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", MANY)
    a, b = (shard_of(tmp_path / "far", name) for name in "ab")
    left, under_way = (cache._path(shard).with_suffix(".tar.tmp") for shard in (a, Url("file:///c.tar")))
    cache.folder.mkdir()
    for path in (left, under_way):
        path.write_bytes(bytes(100))
    with cache._lock(under_way.with_suffix(""), wait=True):  # as the process does that fetches it
        read(cache, b)
        assert not left.exists()
        assert under_way.exists()


def test_what_is_wanted_is_there_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, fetched = ShardCache(tmp_path / "cache", MANY), count_fetches(monkeypatch)
    shards: list[Location] = [shard_of(tmp_path / "far", name) for name in "cab"]
    cache.prefetch([*shards, tmp_path / "local.tar"])
    assert cache._thread is not None
    cache._thread.join()
    assert fetched == ["c.tar", "a.tar", "b.tar"]
    read(cache, shards[1])
    assert len(fetched) == 3


def fetch_all(cache: ShardCache, shards: list[Url]) -> None:
    for shard in shards:
        assert len(set(read(cache, shard))) == 1


def test_processes_share_the_folder(tmp_path: Path) -> None:
    """Both read all shards through a folder that holds two of them."""
    shards = [shard_of(tmp_path / "far", name, 100_000) for name in "abcdef"] * 5
    cache = ShardCache(tmp_path / "cache", 200_000)
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=fetch_all, args=(cache, order)) for order in (shards, shards[::-1])]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0


def test_what_another_process_gives_up_meanwhile_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (shard_of(tmp_path / "far", name) for name in "abc")
    cache = ShardCache(tmp_path / "cache", 2000)
    read(cache, a)
    read(cache, b)
    counted = cache._held

    def before_all_is_gone() -> int:
        bytes_ = counted()
        for path in cache.folder.glob("*.tar"):
            path.unlink()
        return bytes_

    monkeypatch.setattr(cache, "_held", before_all_is_gone)
    read(cache, c)


def test_what_another_process_gives_up_meanwhile_is_room_on_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (shard_of(tmp_path / "far", name) for name in "ab")
    cache, get_file = ShardCache(tmp_path / "cache", MANY), LocalFileSystem.get_file
    read(cache, a)

    def before_all_is_gone(self: LocalFileSystem, name: str, path: str) -> None:
        if held(cache):
            cache.discard(a)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        get_file(self, name, path)

    monkeypatch.setattr(LocalFileSystem, "get_file", before_all_is_gone)
    assert read(cache, b) == b"b" * 1000


@pytest.mark.parametrize("stream", STREAMS)
def test_every_shard_is_announced_before_it_is_read(stream: Stream) -> None:
    def shard_of(folder: int, sample: int) -> int:
        counts = stream.orders[folder].counts
        return next(shard for shard in range(len(counts)) if sample < sum(counts[: shard + 1]))

    announced: list[set[tuple[int, int]]] = []
    for step in range(12):
        announced.append(set(stream.shards_from(step)))
        for place in stream.batch(step)[:2]:
            assert (place.folder, shard_of(place.folder, place.sample)) in announced[step]
    order = Order((4,) * 9, 1, 2)
    windows = [(0, range(16)), (26, range(24, 36)), (33, range(32, 44)), (36, range(36, 52)), (70, range(68, 80))]
    for position, two in windows:  # of an epoch of 36 samples, or of two epochs
        assert set(order.shards_from(position)) == {order.sample_at(at) // 4 for at in two}


def test_shards_are_fetched_ahead_where_one_of_the_folders_is_a_url(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, wanted = ShardCache(tmp_path / "cache", MANY), list[set[Location]]()
    indexes = tuple(load(folder, "train", cache) for folder in (work / "shards", remote(work / "shards")))
    stream = Stream(tuple(Order(index.counts, 0, 1) for index in indexes), (1, 1), (Stage(0, 3, 2),), 0)
    monkeypatch.setattr(ShardCache, "prefetch", lambda _, shards: wanted.append(set(shards)))
    list(StreamSource(indexes, stream, range(3), 0, 1)())
    found = [stream.shards_from(step) for step in range(3)]
    assert wanted == [
        {tar_path(indexes[folder].folder, "train", indexes[folder].shards[shard]) for folder, shard in step}
        for step in found
    ]
    wanted.clear()
    alone = Stream(stream.orders[:1], (1,), stream.stages, 0)
    list(StreamSource(indexes[:1], alone, range(1), 0, 1)())
    assert not wanted


def test_training_from_a_url_is_training_from_a_folder(work: Path, tmp_path: Path) -> None:
    here = small_training(work, tmp_path / "here", max_steps=3)
    there = small_training(
        work, tmp_path / "there", max_steps=3, shards=str(remote(work / "shards")), cache=str(tmp_path / "cache"),
        num_workers=1,
    )  # fmt: skip
    assert_same_state(here, there)
    assert list((tmp_path / "cache").glob("train-*.tar"))


def test_a_copy_that_was_damaged_is_fetched_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load(remote(work / "shards"), "train", ShardCache(tmp_path / "cache", MANY))
    expected, fetched = read_sample(index, 0), count_fetches(monkeypatch)
    (copy,) = (tmp_path / "cache").glob("*.tar")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert read_sample(index, 0) == expected
    assert len(fetched) == 1


def test_a_missing_shard_is_named(work: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    shutil.copytree(work / "shards", far)
    index = load(remote(far), "train", ShardCache(tmp_path / "cache", MANY))
    for tar in (far / "train").glob("*.tar"):
        tar.unlink()
    stream = Stream((Order(index.counts, 0, 2),), (1,), (Stage(0, 3, 2),), 0)
    with pytest.raises(ShardError, match=r"far/train/00000\d.tar: 00000\d-0000\d: .*no such object"):
        next(training_batches((index,), stream, range(2), 0, 0, 1))
