"""One process that makes shards for another: what it is given, tells and is asked, and how its end is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.processes import Worker, _give, _listen, ask, work
from pipeline.settings import TargetsSettings
from pipeline.stage import Stage
from shards.errors import UserError
from tests.helpers import targets_settings
from tests.test_execute import Slow, progress_of, small, whole

__all__ = ["small", "whole"]


def test_a_shards_seconds_count_as_they_are_told_and_once(small: Callable[..., Stage]) -> None:
    """Windows overlap, so that more may be told than the shard holds."""
    stage = small(Slow)
    progress, (first, second, *_) = progress_of(stage), stage.plan.seconds
    ours, theirs = multiprocessing.Pipe()
    worker = Worker("cpu", multiprocessing.current_process(), ours, 0)
    for told, shown in ((first / 4, first / 4), (first / 2, 3 * first / 4), (first, first), (first, first)):
        theirs.send(("advance", told))
        _listen(worker, progress)
        assert progress._bar.n == pytest.approx(shown)
    progress.finish(0, None)
    progress.finish(1, None)
    assert progress._bar.n == pytest.approx(first + second)
    for connection in (progress, ours, theirs):
        connection.close()


class DiesWhileAsked(Slow):
    """As where the model does not fit into memory."""

    def __init__(self, settings: TargetsSettings) -> None:
        super().__init__(settings)
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_while_it_is_asked_is_one_line(small: Callable[..., Stage]) -> None:
    stage = small(DiesWhileAsked)
    with pytest.raises(UserError, match=r"^the process that loads the model died \(exit code -9; −9: memory"):
        ask(DiesWhileAsked, stage.settings)


def test_a_process_computes_on_its_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends, without a word, where its parent is gone."""
    monkeypatch.setattr("pipeline.processes._belong_to_parent", lambda: None)
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        work(Slow, targets_settings(tmp_path), theirs, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        theirs.close()


def test_a_process_that_died_before_it_is_given_a_shard_is_missed_when_it_is_heard() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    worker = Worker("cpu", multiprocessing.current_process(), ours)
    _give(worker, deque([7]))
    assert worker.number == 7
    with pytest.raises((EOFError, ConnectionResetError)):
        _listen(worker, None)  # type: ignore[arg-type]
    ours.close()
