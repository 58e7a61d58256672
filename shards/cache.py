"""Shards and indexes of remote folders, whole, in a local folder of bounded size: shards ahead, in reading order.

Any number of processes on a machine share the folder: a shard is fetched by one of them and appears when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import IO

from shards.errors import UserError
from shards.storage import Location, Url, is_full

KEPT = "*-" + 16 * "[0-9a-f]"  # how names begin of what is kept


class CacheError(UserError):
    """What is read from a URL finds no place on this machine."""


def default_cache() -> ShardCache:
    """8 GiB below the user's cache folder; a folder is made when the first remote shard is read.

    Without a home, as users of containers may be, below the folder for temporary files.
    """
    users = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")  # noqa: PTH111  (pathlib's raises)
    return ShardCache(Path(gettempdir() if users.startswith("~") else users) / "snac48" / "shards", 8 << 30)


@dataclass
class ShardCache:
    """`wanted` are the shards that this process reads now or next, in that order: it never gives them up for others.

    Another process may, and then they are fetched again. `limit_bytes` holds but for what several fetch at once.
    """

    folder: Path
    limit_bytes: int
    wanted: tuple[Url, ...] = ()
    _thread: threading.Thread | None = field(default=None, repr=False)

    def open(self, shard: Location) -> IO[bytes]:
        """Its bytes on this machine; waits while they are fetched. A Path is here already."""
        if isinstance(shard, Path):
            return shard.open("rb")
        path = self._path(shard)
        with self._lock(path, wait=True):
            while True:
                with suppress(FileNotFoundError):  # not fetched, or given up by another process just now
                    file = path.open("rb")
                    os.utime(file.fileno())  # the least recently read goes first
                    return file
                self._fetch(shard, path)

    def discard(self, shard: Location) -> None:
        """Forgets a copy that is not what it should be."""
        if isinstance(shard, Url):
            self._path(shard).unlink(missing_ok=True)

    def prefetch(self, shards: Iterable[Location]) -> None:
        """Fetches in the background what is not here yet; what another process fetches is left to it."""
        self.wanted = tuple(shard for shard in shards if isinstance(shard, Url))
        if self.wanted and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._thread.start()

    def _fetch_wanted(self) -> None:
        for shard in self.wanted:
            path = self._path(shard)
            with suppress(UserError, OSError), self._lock(path, wait=False):  # what is wrong, `open` will say
                if not path.exists():
                    self._fetch(shard, path)

    def _fetch(self, shard: Url, path: Path) -> None:
        size = shard.stat().st_size
        self._make_room(size)
        while True:
            spare = self._spare()  # another process may give it up before this one does
            try:
                shard.fetch(path)
                return
            except OSError as error:
                if not is_full(error):
                    raise
                if not self._give_up(size) and not spare:
                    raise CacheError(
                        f"cache={self.folder}: {error.strerror} for the {size / 2**30:.2f} GiB of {shard}, beside "
                        f"{self._held() / 2**30:.2f} GiB of shards that are read at once: make room, or name a cache= "
                        "on another disk, and a cache_gib= that fits it"
                    ) from error

    def _make_room(self, size: int) -> None:
        """Raises CacheError when the shards that are needed at once take more than the limit."""
        self._drop_leftovers()
        self._give_up(size + self._held() - self.limit_bytes)
        kept = self._kept
        needed = size + sum(bytes_ for _, bytes_, path in self._files() if path in kept)
        if needed > self.limit_bytes:
            raise CacheError(
                f"the shards that are read at once take {needed / 2**30:.2f} GiB, cache_gib allows "
                f"{self.limit_bytes / 2**30:.2f}: allow more, or take fewer window_shards"
            )

    def _give_up(self, needed: int) -> int:
        """Removes what was read least recently of what is spare, so many bytes or more; says how many."""
        freed = 0
        for _, bytes_, path in self._spare():
            if freed >= needed:
                break
            path.unlink(missing_ok=True)
            freed += bytes_
        return freed

    def _spare(self) -> list[tuple[int, int, Path]]:
        """What is not wanted, the least recently read first."""
        kept = self._kept
        return sorted(file for file in self._files() if file[2] not in kept)

    @property
    def _kept(self) -> set[Path]:
        return {self._path(shard) for shard in self.wanted}

    def _held(self) -> int:
        return sum(bytes_ for _, bytes_, _ in self._files())

    def _drop_leftovers(self) -> None:
        """What killed processes had fetched of a shard."""
        for temporary in self.folder.glob(f"{KEPT}.*.tmp"):
            with suppress(BlockingIOError), self._lock(temporary.with_suffix(""), wait=False):
                temporary.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When it was read last, bytes, and where."""
        for path in (path for suffix in (".tar", ".parquet") for path in self.folder.glob(KEPT + suffix)):
            with suppress(FileNotFoundError):  # given up by another process
                stat = path.stat()
                yield stat.st_mtime_ns, stat.st_size, path

    def _path(self, shard: Url) -> Path:
        """Flat, and readable where it may be: `train-000012-` and a hash of the whole URL."""
        digest = hashlib.sha256(shard.text.encode()).hexdigest()[:16]
        return self.folder / f"{shard.parent.name}-{shard.stem}-{digest}{shard.suffix}"

    @contextmanager
    def _lock(self, path: Path, wait: bool) -> Iterator[None]:
        """Held by one process or thread per shard. Raises BlockingIOError where it is held and `wait` is false."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"cache={self.folder} cannot be made ({error.strerror}: {error.filename}): name another cache=, or "
                "XDG_CACHE_HOME in the environment"
            ) from error
        with path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError as error:
                raise CacheError(
                    f"cache={self.folder} cannot be locked ({error.strerror}): name a cache= on a local disk"
                ) from error
            yield
