"""Files that are either whole under their final name or not there, and folders held by one process."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError
from shards.storage import Location, Url


@contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success its bytes reach the disk, then the name is taken over.

    For a Url the temporary name is of a local file, which is uploaded.
    """
    if isinstance(path, Url):
        with path.replacing() as temporary:
            yield temporary
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process. Raises UserError when another process writes there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is writing here; wait for it or choose another folder"
            ) from None
        os.register_at_fork(after_in_child=lock.close)  # else a killed process's workers hold the folder on
        yield


def file_sha256(path: Location) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any binary file will do


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
