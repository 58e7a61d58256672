"""Whoever makes the shards, whoever is killed on the way: the bytes are those of one process, none lost, none twice."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import execute
from pipeline.codes import shard_codes
from pipeline.execute import MAX_IN_A_ROW, Progress, here
from pipeline.plan import Plan
from pipeline.processes import processes
from pipeline.settings import TargetsSettings
from pipeline.stage import Advance, Stage
from pipeline.targets import shard_targets
from shards.contract import PLAN_NAME
from shards.errors import UserError
from shards.storage import Location
from tests.helpers import ROOT, codes_settings, codes_words, targets_settings

SMALL = "segments_per_shard=4"  # so that there are more shards than processes


@pytest.fixture(scope="module")
def whole(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    work = tmp_path_factory.mktemp("one process") / "work"
    shard_codes(codes_settings(recordings, work, SMALL))
    shard_targets(targets_settings(work))
    assert len(Plan(work / PLAN_NAME).shards) >= 6
    return work


def contents(work: Path) -> dict[str, bytes]:
    """But settings, which say how the run was executed, and locks."""
    files = (path for path in work.rglob("*") if path.is_file() and path.name != "settings.json")
    return {str(path.relative_to(work)): path.read_bytes() for path in files if not path.name.startswith(".lock")}


def same(work: Path, whole: Path) -> None:
    found, expected = contents(work), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


class Slow(Stage):
    """Notes which shard is begun; writes it after a while."""

    doing = "waiting"

    @property
    def folder(self) -> Location:
        return self.settings.work / "slow"

    def fingerprint(self, number: int) -> dict[str, Any]:
        return {}

    def make(self, number: int, advance: Advance) -> None:
        assert isinstance(self.folder, Path)
        with (self.folder / "begun").open("a") as file:
            file.write(f"{number}\n")
        self.meanwhile(number)
        (self.folder / f"{number}").touch()
        advance(self.plan.seconds[number])

    def meanwhile(self, number: int) -> None:
        time.sleep(0.3)


class DiesAmid(Slow):
    """Killed amid two shards, once each."""

    def meanwhile(self, number: int) -> None:
        assert isinstance(self.folder, Path)
        died = self.folder / f"died over {number}"
        if number in (1, 2) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Fatal(Slow):
    """Dies or fails as the file `how` in its folder says."""

    def make(self, number: int, advance: Advance) -> None:
        how = (self.folder / "how").read_bytes().decode()
        if how == "die" and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "bug" and number % 2:
            raise ZeroDivisionError("planted")
        if how == "bugs":
            raise ZeroDivisionError("planted")
        if how == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")
        if how == "memory":
            raise MemoryError("planted")
        if how == "keyboard":
            raise KeyboardInterrupt
        super().make(number, advance)


class DiesOnceWhileBuilt(Slow):
    """As a model too large for the memory that is free: killed before its process reads which shard to make."""

    def __init__(self, settings: TargetsSettings) -> None:
        super().__init__(settings)
        assert isinstance(self.folder, Path)
        if multiprocessing.parent_process() is not None and not (self.folder / "died").exists():
            time.sleep(0.3)  # so that the number waits unread
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def small(whole: Path, tmp_path: Path) -> Callable[..., Any]:
    """Builds a stage over the plan, in a folder of its own."""

    def build(kind: type[Stage], how: str = "", *words: str) -> Stage:
        work = tmp_path / "work"
        (work / "slow").mkdir(parents=True)
        shutil.copy(whole / PLAN_NAME, work)
        (work / "slow" / "how").write_text(how)
        return kind(targets_settings(work, *words))

    return build


def progress_of(stage: Stage) -> Progress:
    numbers = range(len(stage.plan.shards))
    return Progress("testing", stage.plan, numbers, numbers)


def made(stage: Stage) -> set[int]:
    assert isinstance(stage.folder, Path)
    return {int(path.name) for path in stage.folder.iterdir() if path.name.isdigit()}


@contextmanager
def killing(find: Callable[[], int | None], times: int) -> Iterator[list[int]]:
    """Kills the process that `find` finds, a few times; the list grows as it does."""
    killed, over = list[int](), threading.Event()

    def kill() -> None:
        while len(killed) < times and not over.wait(0.005):
            pid = find()
            if pid is not None and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()  # other tests' processes are not its affair
        thread.join()


def test_in_a_log_a_problem_stands_between_lines_of_progress(
    small: Callable[..., Stage], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("configs.progress.SECONDS_BETWEEN_LINES", 0)
    stage = small(Slow)
    progress = progress_of(stage)
    progress.finish(0, "planted")
    progress.close()
    lines = capfd.readouterr().err.splitlines()
    problem = lines.index(f"{progress.name(0)} could not be made:")
    assert lines[problem + 1] == "planted"
    shown = [line for number, line in enumerate(lines) if number not in (problem, problem + 1)]
    assert shown[0].startswith("testing:   0%")
    assert all(line.startswith("testing: ") for line in shown)


def test_a_killed_process_loses_nothing(small: Callable[..., Stage]) -> None:
    """Its shard goes to another process; no other shard is begun twice."""
    stage = small(DiesAmid, "", "workers=2")
    assert isinstance(stage.folder, Path)
    numbers, progress = range(len(stage.plan.shards)), progress_of(stage)
    processes(stage, numbers, progress)
    progress.close()
    progress.check()
    assert made(stage) == set(numbers)
    assert sorted(map(int, (stage.folder / "begun").read_text().split())) == sorted([*numbers, 1, 2])


def test_processes_that_stand_still_are_named(
    small: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.processes.SILENCE_SECONDS", 0.0)
    stage = small(Slow, "", "workers=2")
    processes(stage, [0, 1], progress_of(stage))
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(
        r"no progress for 0 minutes of processes \d+ \(shard train/000000\), \d+ \(shard train/000001\): .* "
        "shows R for one that computes",
        said,
    )


def test_a_process_killed_while_it_loads_its_model_loses_nothing(small: Callable[..., Stage]) -> None:
    stage = small(DiesOnceWhileBuilt, "", "workers=2")
    progress = progress_of(stage)
    processes(stage, range(len(stage.plan.shards)), progress)
    progress.close()
    progress.check()
    assert (stage.settings.work / "slow" / "died").exists()
    assert made(stage) == set(range(len(stage.plan.shards)))


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def in_background(*words: str) -> psutil.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": -3, "stderr": -3}
    return psutil.Popen([sys.executable, "-m", "pipeline", *words], env=environment, **quiet)


def test_processes_leave_nothing_in_the_system(recordings: Path, tmp_path: Path) -> None:
    """Python warns, at the end, of semaphores whose processes were killed; tqdm has one."""
    words = [sys.executable, "-m", "pipeline", *codes_words(recordings, tmp_path / "work", SMALL, "workers=2")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "leaked" not in run.stderr


def test_killed_with_its_processes_and_without_them(recordings: Path, whole: Path, tmp_path: Path) -> None:
    """The parent dies, and its processes with it; in the runs that follow, processes die."""
    work = tmp_path / "work"
    parent = in_background(*codes_words(recordings, work, SMALL, "workers=2"))
    while not list((work / "codes").glob("*/*.parquet")) and parent.poll() is None:
        time.sleep(0.005)
    orphans = descendants(parent.pid)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(orphans, timeout=120)[1] == []

    def busy() -> int | None:
        """A process that has a shard's temporary file open."""
        for process in descendants(os.getpid()):
            with suppress(psutil.Error):
                if any(file.path.endswith(".tmp") for file in process.open_files()):
                    return process.pid
        return None

    with killing(busy, 2) as killed:
        shard_codes(codes_settings(recordings, work, SMALL, "workers=2"))
        shard_targets(targets_settings(work, "workers=2"))
    assert killed
    same(work, whole)


def test_a_shard_that_keeps_killing_ends_the_run(small: Callable[..., Stage]) -> None:
    """It comes first again, so that the run ends soon."""
    stage = small(Fatal, "die")
    with pytest.raises(UserError, match=r"3 processes died over shard train/000001 \(exit code -9"):
        processes(stage, range(len(stage.plan.shards)), progress_of(stage))
    assert made(stage) == {0}


@pytest.mark.parametrize("run", [here, processes])
def test_an_unforeseen_error_costs_its_shard_and_shows_at_the_end(
    run: Callable[..., None], small: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    stage = small(Fatal, "bug", "workers=2")
    progress = progress_of(stage)
    run(stage, range(len(stage.plan.shards)), progress)
    assert made(stage) == set(range(0, len(stage.plan.shards), 2))
    with pytest.raises(UserError, match=r"shards could not be made, such as train/000001: ZeroDivisionError: planted"):
        progress.check()
    assert "Traceback" in capfd.readouterr().err


def test_a_run_that_left_a_shard_out_fails_and_leaves_the_others(small: Callable[..., Stage]) -> None:
    stage = small(Fatal, "bug")
    with pytest.raises(UserError, match=r"^\d shards could not be made, such as train/000001: ZeroDivisionError"):
        execute.run(stage)
    assert made(stage) == set(range(0, len(stage.plan.shards), 2))


@pytest.mark.parametrize("run", [here, processes])
def test_one_error_after_the_other_ends_the_run(
    run: Callable[..., None], small: Callable[..., Stage], capfd: pytest.CaptureFixture[str]
) -> None:
    stage = small(Fatal, "bugs", "workers=2")
    with pytest.raises(UserError, match=rf"{MAX_IN_A_ROW} shards in a row could not be made, .*: ZeroDivisionError"):
        run(stage, range(len(stage.plan.shards)), progress_of(stage))
    assert capfd.readouterr().err.count("could not be made:\n") == MAX_IN_A_ROW


def test_a_full_disk_memory_and_the_keyboard_are_no_bad_shards(small: Callable[..., Stage]) -> None:
    stage = small(Fatal, "disk", "workers=2")
    with pytest.raises(OSError, match="No space left"):
        here(stage, [0], progress_of(stage))
    with pytest.raises(UserError, match=r"^No space left on device: some file"):
        processes(stage, [0, 1], progress_of(stage))
    assert isinstance(stage.folder, Path)
    (stage.folder / "how").write_text("memory")
    with pytest.raises(MemoryError, match="planted"):
        here(stage, [0], progress_of(stage))
    (stage.folder / "how").write_text("keyboard")
    with pytest.raises(KeyboardInterrupt):
        here(stage, [0], progress_of(stage))


def test_ctrl_c_says_what_stays(small: Callable[..., Stage]) -> None:
    with pytest.raises(UserError, match=r"stopped by Ctrl-C: finished shards stay, the same command makes the others"):
        execute.run(small(Fatal, "keyboard"))
