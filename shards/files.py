"""Files that are either whole under their final name or not there, and folders held by one process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from shards.errors import UserError, printable
from shards.pieces import Fetched, Part
from shards.storage import OF_WRITING, Location, Url, is_full, naming_written

OF_ONE_FILE = {  # errors that say something of one file; others, such as EIO, ESTALE or EMFILE, of the system
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL, errno.EILSEQ,
}  # fmt: skip
NO_SUCH_THING = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS}  # that a file system answers

LOOK_SECONDS = 0.1  # more than `just status` takes to see whether a folder is held


@contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success its bytes reach the disk, then the name is taken over.

    Raises UserError where another process is at it, or a folder stands there. For a Url the temporary name is of a
    local file, which is uploaded.
    """
    if isinstance(path, Url):
        with path.replacing() as temporary:
            yield temporary
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: take another name, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for it or choose another name") from None
        except OSError:  # a file system without locks, where two writers are not told apart
            pass
        if not _is_named(lock, temporary):
            raise UserError(f"{path}: another process has just written it; try again")
        try:
            with naming_written(path):
                yield temporary
                os.fsync(lock.fileno())
                check_is_ours(lock, temporary)
                _rename(temporary, path)
        except BaseException:
            if _is_named(lock, temporary):
                temporary.unlink()
            raise
    _fsync_folder(path.parent)


class NotOursError(UserError):
    """This process stood still, its run was killed or taken for dead, and another one cleaned up."""


def check_is_ours(file: IO[bytes], temporary: Path) -> None:
    if not _is_named(file, temporary):
        raise NotOursError(f"{temporary} is another process's by now, or gone: leave it to that, or try again")


def _is_named(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def write_whole(path: Location, content: str | bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def move(path: Location, target: Location) -> None:
    """A whole file takes the name of another, or of none. Remote: it is copied, and then goes."""
    if isinstance(path, Url) or isinstance(target, Url):
        write_whole(target, path.read_bytes())
        path.unlink(missing_ok=True)
        return
    _rename(path, target)
    _fsync_folder(target.parent)


def _rename(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as error:
        if error.errno not in {*NO_SUCH_THING, errno.EEXIST, errno.EPERM}:
            raise
        raise UserError(
            f"{target} cannot be replaced ({error.strerror}): it is protected (lsattr) or another user's, or its file "
            "system does not rename over what stands; then choose a folder on another"
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields the name of a folder to make, which becomes `out` on success. Raises UserError where that exists, or where
    another process is making it; what a killed one had made of it goes.
    """
    if out.exists():
        raise UserError(f"out={out} exists: choose another folder or delete it")
    temporary = out.with_name(f".{out.name}.tmp")
    made = temporary / out.name
    try:
        with exclusive(temporary):
            try:
                shutil.rmtree(made, ignore_errors=True)
                yield made
                if out.exists():
                    raise UserError(f"out={out} was made meanwhile: choose another folder or delete it")
                made.rename(out)
            finally:
                shutil.rmtree(made, ignore_errors=True)  # before its lock: what is made after that is another's
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        with suppress(OSError):  # NFS and FUSE keep a lock that was deleted under another name, until it is closed
            temporary.rmdir()
    _fsync_folder(out.parent)


@contextmanager
def exclusive(folder: Path, name: str = ".lock", *, shared: bool = False, waiting: str = "") -> Iterator[None]:
    """Holds `folder` for this process, or with others that hold it `shared`.

    Where another process stands in the way: raises UserError, or says `waiting` and waits for it to end. The file says
    who holds it alone. Where it made the folder, and nothing came to stand there, as of a run that was refused, the
    folder goes.
    """
    too_late = UserError(f"{folder}: another process has just written here; try again")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a+b")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: a file stands where a folder is needed; choose another folder") from None
    except FileNotFoundError:  # the folder, or its parent, was one that another process made, and went
        raise too_late from None
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with lock:
        try:
            _take(lock, how)
        except BlockingIOError:
            who = _holder(lock)
            if not waiting:
                raise UserError(
                    f"{folder}: another process is writing here{who}; wait for it or choose another folder"
                ) from None
            print(f"{waiting}{who}: waiting for it", flush=True)
            fcntl.flock(lock, how)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be locked ({error.strerror}), and two runs could write here at once: mount its "
                "file system with flock (Lustre: -o flock), or choose a folder on another"
            ) from error
        if not _is_named(lock, folder / name):  # it went with that folder
            raise too_late
        _sign(lock, b"" if shared else _myself())  # of several, whoever signs last may be the first to go
        os.register_at_fork(after_in_child=lock.close)  # else a killed process's workers hold the folder on
        try:
            yield
        finally:
            _sign(lock, b"")
            if made and not shared:
                _clear_away(lock, folder / name, made)


def _clear_away(lock: IO[bytes], path: Path, made: Sequence[Path]) -> None:
    """Of the folders made for a lock, those where nothing else came to stand. It goes first, while it is held: so who
    has opened it meanwhile sees that it went.
    """
    with suppress(OSError):
        if _is_named(lock, path) and [*path.parent.iterdir()] == [path]:
            path.unlink()
            lock.close()  # NFS and FUSE keep under another name what is deleted while it is open
            for folder in made:
                folder.rmdir()


def _take(lock: IO[bytes], how: int) -> None:
    """Raises BlockingIOError where another process holds it, and not just to see whether anybody does."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK_SECONDS)
        fcntl.flock(lock, how | fcntl.LOCK_NB)


def _myself() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}".encode()


def _sign(lock: IO[bytes], who: bytes) -> None:
    with suppress(OSError):  # on a full disk the lock holds all the same
        lock.truncate(0)
        os.write(lock.fileno(), who)


def _holder(lock: IO[bytes]) -> str:
    """` (process 123 on HOST since 2030-01-31 12:34)`, or nothing."""
    lock.seek(0)
    who = lock.read(200).decode(errors="replace")
    return f" ({printable(who)})" if who else ""


def described(error: BaseException) -> str:
    """In one line: what and where and, of a disk that is full, the way out."""
    if not isinstance(error, OSError) or not error.errno:
        return str(error) or type(error).__name__
    what = os.strerror(error.errno) if error.errno in OF_WRITING else error.strerror  # pyarrow's words are longer
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename  # of TensorBoard
    where = name or ("while writing" if error.errno in OF_WRITING - {errno.EIO} else "")
    way_out = "make room (df -h, df -i), and run the same command again" if is_full(error) else ""
    return ": ".join(filter(None, (what, str(where), way_out)))


def reason_of_one(path: object, error: OSError) -> str:
    """Why this file alone cannot be read. Raises UserError where the disk or server fails on which it should lie."""
    reason = error.strerror or str(error)
    path = path.whole if isinstance(path, Part) else path
    if not isinstance(path, Path):
        return reason
    if error.errno not in OF_ONE_FILE:
        raise UserError(
            f"{path}: {reason}: its disk or server fails; once it works again, repeat the command (if only this file "
            "cannot be read, delete it)"
        )
    if error.errno == errno.ENOENT:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not any(folder.iterdir()):
            raise UserError(f"{folder} is empty: is it mounted? If {path} is gone for good, delete the empty folder")
    return reason


def file_sha256(path: Location | Fetched) -> str:
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """From where it stands to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any binary file will do


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming_written(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SUCH_THING:  # of a file system that does not flush folders, as of a machine's share
            raise
    finally:
        os.close(descriptor)
