"""A file is whole under its name or not there, and one process at a time writes it."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.plan import make_plan
from shards.contract import PLAN_NAME
from shards.errors import UserError
from shards.files import described, exclusive, move, new_folder, replacing
from shards.index import write_index
from shards.writer import naming, write_table
from tests.helpers import ROOT, codes_settings, longest_file
from trainer.status import is_running


def test_bytes_reach_the_disk_before_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def watched_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        calls.append("name " + target.name)
        return replace(self, target)

    def watched_rename(self: Path, target: Path) -> Path:
        calls.append("name " + target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("text")
    move(tmp_path / "file", tmp_path / "moved")
    with new_folder(tmp_path / "folder") as made:
        made.mkdir()
    named = [call for name in ("file", "moved", "folder") for call in (f"name {name}", f"fsync {tmp_path.name}")]
    assert calls == ["fsync file.tmp", *named]


def test_what_could_not_be_written_is_said(tmp_path: Path) -> None:
    """Neither Python nor pyarrow says it."""
    path, table = tmp_path / "file", pa.table({"a": os.urandom(4000).hex().split("0")})
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(bytes(2000)),
        lambda path: pq.write_table(table, path),
    ]
    for write_to in writers:
        with pytest.raises(OSError, match="File too large") as error, longest_file(1000), replacing(path) as temporary:
            write_to(temporary)
        assert described(error.value) == f"File too large: {path}"
        assert not list(tmp_path.iterdir())
    full = OSError(errno.ENOSPC, "pyarrow's words")
    with pytest.raises(OSError, match="words"), replacing(path):
        raise full
    assert described(full) == (
        f"No space left on device: {path}: make room (df -h, df -i), and run the same command again"
    )
    assert described(FileNotFoundError(errno.ENOENT, "No such file", b"/a/b")) == "No such file: /a/b"
    assert described(OSError(errno.EMFILE, "Too many open files")) == "Too many open files"  # as of a socket


def test_what_could_not_be_read_is_said(tmp_path: Path) -> None:
    """Of a bad block the system says nothing else, and that it was to be written is not known."""
    bad = OSError(errno.EIO, os.strerror(errno.EIO))
    assert described(bad) == "Input/output error"
    with pytest.raises(OSError, match="error"), naming(tmp_path), naming(tmp_path / "table.parquet"):
        raise bad
    assert described(bad) == f"Input/output error: {tmp_path}/table.parquet"


class FullWhenClosed(io.FileIO):
    """As of NFS and some FUSE file systems, which say only then that there is no room."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("writes", ["table", "index", "plan"])
def test_a_table_without_room_when_it_is_closed_is_said(
    writes: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pyarrow it is closed with `error closing file`."""
    table, path = pa.table({"a": [1]}), tmp_path / PLAN_NAME

    def index() -> None:
        with replacing(path) as temporary:
            write_index(temporary, table.schema, [table])

    writers: dict[str, Callable[[], object]] = {
        "table": lambda: write_table(path, table, {}),
        "index": index,
        "plan": lambda: make_plan(codes_settings(recordings, tmp_path)),
    }
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **more: FullWhenClosed(path, mode) if mode == "wb" else opened(path, mode, **more),
    )
    with pytest.raises(OSError, match="quota") as error:
        writers[writes]()
    assert described(error.value).startswith(f"Disk quota exceeded: {path}: make room")
    assert not list(tmp_path.glob("*"))


def test_a_folder_is_named_before_anything_is_written(tmp_path: Path) -> None:
    said = rf"^{re.escape(str(tmp_path))} is a folder: take another name, or delete it$"
    with pytest.raises(UserError, match=said), replacing(tmp_path):
        pytest.fail("too late")


@contextmanager
def another(program: str, path: Path, killed: bool) -> Iterator[None]:
    """While another process is in the midst of writing `path`; then it is killed, or comes to its end."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        yield
        if killed:
            process.kill()
        process.communicate()


WRITE = """
import sys
from pathlib import Path
from shards.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("first")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_at_a_time_writes_a_file(killed: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with another(WRITE, path, killed):
        with pytest.raises(UserError, match="file: another process is writing it"), replacing(path):
            pass
        assert not path.exists()
    assert path.exists() != killed
    with replacing(path) as temporary:
        temporary.write_text("second")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "second")]


MAKE = """
import sys
from pathlib import Path
from shards.files import new_folder
with new_folder(Path(sys.argv[1])) as made:
    made.mkdir()
    (made / "first").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_at_a_time_makes_a_folder_and_a_killed_one_leaves_nothing(killed: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with another(MAKE, out, killed):
        with pytest.raises(UserError, match="another process is writing here"), new_folder(out):
            pass
        assert not out.exists()
    if killed:
        with new_folder(out) as made:
            made.mkdir()
            (made / "second").touch()
    else:
        with pytest.raises(UserError, match="exists"), new_folder(out):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in out.iterdir()] == ["second" if killed else "first"]


def test_nothing_is_left_where_what_is_open_keeps_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and FUSE rename an open file that is deleted; it goes, and its folder can go, once it is closed."""
    out, hidden = tmp_path / "out", tmp_path / ".out.tmp" / ".nfs1"
    rmtree, rmdir = shutil.rmtree, Path.rmdir

    def renaming(folder: Path, **options: Any) -> None:
        if (folder / ".lock").exists():
            (folder / ".lock").rename(hidden)
        else:
            rmtree(folder, **options)

    def when_closed(folder: Path) -> None:
        if str(hidden) not in [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]:
            hidden.unlink()
        rmdir(folder)

    monkeypatch.setattr(shutil, "rmtree", renaming)
    monkeypatch.setattr(Path, "rmdir", when_closed)
    with new_folder(out) as made:
        made.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_made_meanwhile_stands(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="made meanwhile"), new_folder(out):
        out.mkdir()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_who_opened_the_name_before_it_was_taken_does_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock would be on the finished file of the other."""
    path, flock = tmp_path / "file", fcntl.flock

    def late(lock: Any, how: int) -> None:
        monkeypatch.undo()
        with replacing(path) as temporary:
            temporary.write_text("first")
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process has just written it"), replacing(path):
        pass
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "first")]


@pytest.mark.parametrize(("owner", "step"), [(fcntl, "flock"), (Path, "mkdir")])
def test_who_opened_a_lock_that_goes_with_its_folder_does_not_hold_it(
    owner: Any, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the process does that made the folder `out` when another comes to make it, too; a third would not see it."""
    out, take = tmp_path / "out", getattr(owner, step)

    def and_it_goes(*words: Any, **options: Any) -> None:
        take(*words, **options)
        shutil.rmtree(tmp_path / ".out.tmp")

    monkeypatch.setattr(owner, step, and_it_goes)
    with pytest.raises(UserError, match="another process has just written here; try again"), new_folder(out):
        pytest.fail("too early")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_another_clears_away_meanwhile_is_no_fault_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def and_it_goes(path: Path, *mode: int) -> None:
        mkdir(path, *mode)
        path.rmdir()

    monkeypatch.setattr(os, "mkdir", and_it_goes)
    with (
        pytest.raises(UserError, match="another process has just written here; try again"),
        exclusive(tmp_path / "a" / "b"),
    ):
        pytest.fail("too early")


def test_what_failed_goes_before_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once that is gone, another process may make the folder, and nothing of it goes."""
    left: list[list[str]] = []
    rmtree = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        if path.name == ".out.tmp":
            left.append([inner.name for inner in path.iterdir()])
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with suppress(UserError), new_folder(tmp_path / "out") as made:
        made.mkdir()
        raise UserError("planted")
    assert left == [[".lock"]]
    assert not list(tmp_path.iterdir())


def test_who_lost_the_temporary_name_to_another_run_leaves_it_alone(tmp_path: Path) -> None:
    """As a process that stood still while its run was killed, and another run cleaned up and began."""
    path = tmp_path / "file"
    first, second = replacing(path), replacing(path)
    first.__enter__().write_text("first")
    path.with_name("file.tmp").unlink()
    second.__enter__().write_text("half")
    with pytest.raises(UserError, match=r"tmp is another process's by now, or gone: leave it to that"):
        first.__exit__(None, None, None)
    assert not path.exists()
    path.with_name("file.tmp").write_text("second")
    second.__exit__(None, None, None)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "second")]


@pytest.mark.parametrize("error", [errno.EEXIST, errno.EPERM, errno.ENOSYS])
def test_a_file_system_that_renames_over_nothing_is_said(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(path: Path, target: Path) -> None:
        raise OSError(error, os.strerror(error), str(path), None, str(target))

    monkeypatch.setattr(Path, "replace", none)
    path = tmp_path / "file"
    path.write_text("first")
    said = rf"^{path} cannot be replaced \({os.strerror(error)}\).*choose a folder on another$"
    with pytest.raises(UserError, match=said), replacing(path) as temporary:
        temporary.write_text("second")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "first")]
    (tmp_path / "other").write_text("second")
    with pytest.raises(UserError, match=said):
        move(tmp_path / "other", path)


def test_a_file_system_without_locks_will_do_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(lock: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "whole")]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_whose_folders_cannot_be_flushed_will_do(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_locked_is_named(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(lock: Any, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", none)
    expected = rf"{tmp_path} cannot be locked \({os.strerror(error)}\).* choose a folder on another"
    with pytest.raises(UserError, match=expected), exclusive(tmp_path):
        pass


def test_who_holds_a_folder_alone_is_said(tmp_path: Path) -> None:
    """Each time it is asked; of several that share it none is, nor who held it before."""
    mine = (
        rf"writing here \(process {os.getpid()} on {re.escape(socket.gethostname())} since 2\d{{3}}-.*\); wait for it"
    )
    with exclusive(tmp_path):
        for _ in range(2):
            with pytest.raises(UserError, match=mine), exclusive(tmp_path):
                pass
    refused = pytest.raises(UserError, match="writing here; wait for it")
    with exclusive(tmp_path, shared=True), exclusive(tmp_path, shared=True), refused, exclusive(tmp_path):
        pass


def test_a_folder_that_is_just_looked_at_can_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`just status` holds the lock for a moment."""
    with exclusive(tmp_path):
        pass
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(lock, fcntl.LOCK_UN))
        with exclusive(tmp_path):
            assert is_running(tmp_path)


def test_a_folder_is_held_where_the_disk_is_too_full_to_say_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with exclusive(tmp_path), pytest.raises(UserError, match="writing here; wait for it"), exclusive(tmp_path):
        pass
