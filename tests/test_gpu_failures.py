"""What a GPU does to those who make shards: memory that runs out, a context that dies, numbers that are not 0."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codec.snac import visible
from pipeline.execute import here, makes_elsewhere
from pipeline.plan import Plan
from pipeline.processes import _seeing_its_gpu_alone, ask, processes
from pipeline.stage import Advance, Stage
from shards.contract import PLAN_NAME
from shards.errors import UserError
from tests.helpers import targets_settings
from tests.test_execute import Slow, made, progress_of


class Broken(Slow):
    """The GPU of the process that makes shard 1 first is lost to it, or out of memory."""

    def make(self, number: int, advance: Advance) -> None:
        assert isinstance(self.folder, Path)
        if (self.folder / "full").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
        if number == 1 and not (self.folder / "lost").exists():
            (self.folder / "lost").touch()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
        super().make(number, advance)


@pytest.fixture
def broken(work: Path, tmp_path: Path) -> Callable[..., Stage]:
    def build(*words: str) -> Stage:
        (tmp_path / "work" / "slow").mkdir(parents=True)
        shutil.copy(work / PLAN_NAME, tmp_path / "work")
        return Broken(targets_settings(tmp_path / "work", *words))

    return build


def test_a_lost_gpu_costs_its_process_and_no_shard(broken: Callable[..., Stage]) -> None:
    stage = broken("workers=2")
    numbers = range(len(Plan(stage.settings.work / PLAN_NAME).shards))
    assert len(numbers) > 1
    progress = progress_of(stage)
    processes(stage, numbers, progress)
    progress.check()
    assert made(stage) == set(numbers)
    assert isinstance(stage.folder, Path)
    assert (stage.folder / "lost").exists()


class TellsItsGpu(Slow):
    """The process that makes shard 1 first is killed."""

    def make(self, number: int, advance: Advance) -> None:
        assert isinstance(self.folder, Path)
        with (self.folder / "seen").open("a") as file:
            file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {self.settings.gpu}\n")
        if number == 1 and not (self.folder / "lost").exists():
            (self.folder / "lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().make(number, advance)


def test_each_gpu_has_a_process_and_another_when_that_died(
    broken: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("pipeline.processes.device_of", lambda gpu: None)
    stage = TellsItsGpu(broken("gpu=2,3").settings)
    processes(stage, [0, 1, 2, 3], progress_of(stage))
    seen = (stage.settings.work / "slow" / "seen").read_bytes().decode().splitlines()
    assert set(seen) == {"2 0", "3 0"}
    assert seen.count("3 0") >= 2
    assert made(stage) == {0, 1, 2, 3}


def test_in_this_process_it_is_one_line(broken: Callable[..., Stage]) -> None:
    stage = broken()
    with pytest.raises(UserError, match=r"^the GPU failed: CUDA error: .* encountered; the same command goes on$"):
        here(stage, [1], progress_of(stage))


def test_memory_that_ran_out_ends_the_run_with_a_way_out(broken: Callable[..., Stage]) -> None:
    stage = broken()
    assert isinstance(stage.folder, Path)
    (stage.folder / "full").touch()
    with pytest.raises(UserError, match=r"the GPU's memory ran out: lower batch_seconds \(.* 3 GiB.\)$"):
        here(stage, [0], progress_of(stage))


@pytest.mark.parametrize(("granted", "expected"), [(None, "2"), ("4,5,6", "6"), ("GPU-a,GPU-b,GPU-c", "GPU-c")])
def test_a_process_sees_its_gpu_alone_as_the_first(
    granted: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", granted or "")
    if granted is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    settings: Any = targets_settings(tmp_path, "gpu=2")
    assert makes_elsewhere(settings)
    assert visible(2) == expected
    assert _seeing_its_gpu_alone(settings).gpu == 0
    assert visible(0) == expected


def test_the_first_gpu_and_the_cpu_need_no_process_of_their_own(tmp_path: Path) -> None:
    assert not makes_elsewhere(targets_settings(tmp_path, "gpu=0"))
    assert not makes_elsewhere(targets_settings(tmp_path))
    for words in (["gpu=0,1"], ["workers=2"], ["execute=ray"]):
        assert makes_elsewhere(targets_settings(tmp_path, *words))


def test_a_gpu_that_is_not_there_is_named_as_it_was_asked_for(
    broken: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a process starts, for which it is number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stage = broken("gpu=2,3")
    for make in (lambda: processes(stage, [0, 1], progress_of(stage)), lambda: ask(Broken, stage.settings)):
        with pytest.raises(UserError, match=r"^gpu=2: no GPU is usable here"):
            make()
