"""Jobs in several processes: in order, few at a time, errors as they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from trainer.pool import ordered


def square(number: int) -> int:
    if number == 0:
        time.sleep(0.3)  # the first is not ready first
    if number == 100:
        raise UserError("a hundred is too much")
    if number == 101:
        os._exit(1)
    return number * number


def numbers(count: int, taken: list[int]) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_order_and_jobs_are_taken_as_they_are_needed(processes: int) -> None:
    taken: list[int] = []
    results = ordered(square, numbers(10, taken), processes)
    assert next(results) == 0
    assert len(taken) <= max(2 * processes, 1)
    assert list(results) == [number * number for number in range(1, 10)]


@pytest.mark.parametrize(("job", "message"), [(100, "a hundred is too much"), (101, "a process died: memory")])
def test_errors_reach_the_caller(job: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(ordered(square, iter([1, job, 2]), 1))


def hears_ctrl_c(_: int) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_is_heard_by_one_process() -> None:
    """Each of the others would show where it was."""
    assert list(ordered(hears_ctrl_c, iter(range(4)), 2)) == [False] * 4
    assert hears_ctrl_c(0)


def threads(_: int) -> int:
    return torch.get_num_threads()


def test_each_process_computes_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert list(ordered(threads, iter(range(2)), 1)) == [1, 1]


def finished_late(marker: Path) -> None:
    time.sleep(60)
    marker.touch()


def stands_still(marker: Path) -> None:
    marker.with_name("begun").touch()
    os.kill(os.getpid(), signal.SIGSTOP)
    marker.touch()


@pytest.mark.parametrize("work", [finished_late, stands_still])
def test_ctrl_c_waits_for_no_job(work: Callable[[Path], None], tmp_path: Path) -> None:
    def jobs() -> Iterator[Path]:
        yield tmp_path / "finished"
        while work is stands_still and not (tmp_path / "begun").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    others = multiprocessing.active_children()  # of tests before
    with pytest.raises(KeyboardInterrupt):
        list(ordered(work, jobs(), 1))
    assert not (tmp_path / "finished").exists()
    assert {*multiprocessing.active_children()} <= {*others}
