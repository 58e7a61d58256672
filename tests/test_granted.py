"""A container's cores and memory, which neither Python nor OpenMP knows."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from configs import granted
from tests.training_helpers import call
from trainer import distributed


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 96 cores."""
    monkeypatch.setattr(granted, "CGROUPS", tmp_path)
    monkeypatch.setattr(granted, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))


def groups(folder: Path, own: str, files: dict[str, str]) -> None:
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("", {}, 96),
        ("0::/", {"cpu.max": "max 100000"}, 96),
        ("0::/", {"cpu.max": "765000 100000"}, 7),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/docker/1f", {"cpu.max": "400000 100000"}, 4),
        (
            "0::/a/b/c",
            {"a/cpu.max": "800000 100000", "a/b/cpu.max": "max 1", "a/b/c/cpu.max": "2400000 100000"},
            8,
        ),
        ("4:cpuset:/\n3:cpu,cpuacct:/\n0::/", {"cpu/cpu.cfs_quota_us": "765000", "cpu/cpu.cfs_period_us": "100000"}, 7),
        ("1:cpu:/a", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 96),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_are_those_of_the_narrowest_quota(own: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    groups(tmp_path, own, files)
    assert granted.granted_cores() == cores


@pytest.mark.parametrize(
    ("own", "files", "gigabytes"),
    [
        ("", {}, 512),
        ("0::/", {"memory.max": "max"}, 512),
        ("0::/", {"memory.max": "16000000000"}, 16),
        ("0::/a/b", {"a/memory.max": "8000000000", "a/b/memory.max": "24000000000"}, 8),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "4000000000"}, 4),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, 512),
    ],
)
def test_memory_is_that_of_the_narrowest_limit(
    own: str, files: dict[str, str], gigabytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 125_000_000}.__getitem__)
    groups(tmp_path, own, files)
    assert granted.granted_memory() == gigabytes * 10**9


def test_no_control_groups_grant_all(tmp_path: Path) -> None:
    assert not (tmp_path / "own").exists()
    assert granted.granted_cores() == 96


@pytest.mark.parametrize(("asked", "quota", "told"), [("", 8, "8"), ("3", 8, "3"), ("", 0, "")])
def test_openmp_is_told_unless_it_was(
    asked: str, quota: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("0::/")
    (tmp_path / "cpu.max").write_text(f"{quota}00000 100000" if quota else "max 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    if not asked:
        monkeypatch.delenv("OMP_NUM_THREADS")
    call("status", f"run={tmp_path}")
    assert os.environ.get("OMP_NUM_THREADS", "") == told


@pytest.mark.parametrize(("told", "passed_on"), [("8", None), ("3", "3")])
def test_each_of_several_processes_does_not_get_the_threads_of_all(
    told: str, passed_on: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun gives each its own number where it is told none."""
    (tmp_path / "own").write_text("0::/")
    (tmp_path / "cpu.max").write_text("800000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    given: dict[str, str] = {}
    monkeypatch.setattr(os, "execve", lambda program, words, environment: given.update(environment))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(distributed, "device_of", lambda gpu: None)
    monkeypatch.setattr(distributed, "visible", str)
    distributed.launch("0,1")
    assert given["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert given.get("OMP_NUM_THREADS") == passed_on
