"""SIGKILL at any moment costs time, never the result."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Tally
from tests.helpers import ROOT
from tests.test_killed_pipeline import context
from tests.test_saving import at_step
from tests.training_helpers import (
    ADVERSARIAL,
    as_logged,
    assert_same_state,
    largest_difference,
    last_state,
    logged_steps,
    train_settings,
    train_words,
)
from trainer import checkpoint
from trainer.loop import train

__all__ = ["context"]

KILLS, KILLS_OF_ONE_IN_TWO = 20, 2
SETTINGS = {"checkpoint_every": 1, "eval_every": 2, "max_steps": 5}
TOGETHER = SETTINGS | {"batch_size": 3}  # ranks take one crop and two

FORTY = {
    "checkpoint_every": 17, "eval_every": 20, "max_steps": 40, "keep_last": 9, "phase1_steps": 10, "ema_decay": 0.9,
    "final_rate": 0.01, "warmup_steps": 3, "segment_schedule": [[0, 0.085], [20, 0.17]], "batch_size": 4,
}  # fmt: skip


def train_quietly(work: Path, run: Path, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    train(train_settings(work, run, **changes))


def train_as_rank(rank: int, port: int, work: Path, run: Path, changes: dict[str, Any]) -> None:
    """One of two processes, as torchrun starts them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **where}
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
    train_quietly(work, run, changes)


def start(context: ForkServerContext, work: Path, run: Path, changes: dict[str, Any] = SETTINGS) -> BaseProcess:
    process = context.Process(target=train_quietly, args=(work, run, changes))
    process.start()
    return process


def train_until_killed(work: Path, run: Path, changes: dict[str, Any]) -> None:
    """Amid the 23rd step."""
    at_step(22, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
    train_quietly(work, run, changes)


def wait_for_step(process: BaseProcess, run: Path, step: int) -> None:
    """Until there is a checkpoint of this step or a later one, or the process has ended."""
    while process.is_alive():
        newest = checkpoint.newest(run)
        if step == 0 or (newest is not None and newest >= checkpoint.step_path(run, step)):
            return
        time.sleep(0.002)


def test_killed_twenty_times(context: ForkServerContext, work: Path, tmp_path: Path, times: int, tally: Tally) -> None:
    """Each run is killed and started again until it ends; then it is the undisturbed one, and another run begins."""
    undisturbed = tmp_path / "undisturbed"
    process = start(context, work, undisturbed)
    process.join()
    assert process.exitcode == 0

    wanted, delays, kills, number, resumed = KILLS * times, random.Random(0), 0, 0, set()
    while kills < wanted or (tmp_path / str(number)).exists():
        assert number < wanted, "most runs ended before they were killed"
        run = tmp_path / str(number)
        process = start(context, work, run)
        if kills < wanted:
            begun = 0 if checkpoint.newest(run) is None else last_state(run)["step"]
            wait_for_step(process, run, begun + delays.randrange(3))
        process.join(delays.uniform(0, 0.2) if kills < wanted else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            resumed.add(None if checkpoint.newest(run) is None else last_state(run)["step"])
            unfinished = list(run.rglob("*.tmp"))
            tally["SIGKILL, training", "while a file was written" if unfinished else "between files"] += 1
            continue
        assert process.exitcode == 0
        assert_same_state(last_state(run), last_state(undisturbed))
        assert as_logged(run) == as_logged(undisturbed)
        assert logged_steps(run, "train") == [1, 2, 3, 4, 5]
        best, expected = (checkpoint.load(checkpoint.folder(folder) / checkpoint.BEST) for folder in (run, undisturbed))
        assert (best["step"], best["validation"]) == (expected["step"], expected["validation"])
        assert not list(run.rglob("*.tmp"))
        number += 1
    assert len(resumed) >= 3, f"the kills fell at too few places: {resumed}"


def start_two(context: ForkServerContext, work: Path, run: Path) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair: list[BaseProcess] = [
        context.Process(target=train_as_rank, args=(rank, port, work, run, TOGETHER)) for rank in range(2)
    ]
    for process in pair:
        process.start()
    return pair


def ended(pair: list[BaseProcess]) -> list[int | None]:
    for process in pair:
        process.join()
    return [process.exitcode for process in pair]


def test_one_of_two_processes_is_killed(
    context: ForkServerContext, work: Path, tmp_path: Path, times: int, tally: Tally
) -> None:
    """The other leaves with an error, of itself; two more go on, and end as two do that nothing disturbed."""
    undisturbed = start_two(context, work, tmp_path / "undisturbed")
    assert ended(undisturbed) == [0, 0]
    expected, delays, kills, number = last_state(tmp_path / "undisturbed"), random.Random(1), 0, 0
    while kills < KILLS_OF_ONE_IN_TWO * times:
        run, number = tmp_path / str(number), number + 1
        pair = start_two(context, work, run)
        wait_for_step(pair[0], run, 1 + delays.randrange(2))
        victim = delays.randrange(2)
        pair[victim].join(delays.uniform(0, 0.2))
        if pair[victim].is_alive():
            pair[victim].kill()
            kills += 1
            tally["SIGKILL, training by two processes", f"rank {victim}"] += 1
            pair[1 - victim].join(300)
            assert pair[1 - victim].exitcode in (0, 1), "the other process hangs"  # 0 where only the end was left
            pair = start_two(context, work, run)
        assert ended(pair) == [0, 0]
        assert_same_state(last_state(run), expected)
        assert as_logged(run) == as_logged(tmp_path / "undisturbed")


@pytest.mark.parametrize("recipe", [{}, {**ADVERSARIAL, "balance_losses": True}], ids=["base", "adversarial"])
def test_forty_steps_are_seventeen_a_kill_and_the_rest(
    recipe: dict[str, Any], context: ForkServerContext, work: Path, tmp_path: Path
) -> None:
    """Over both phases and two lengths of crops; the rest is read by a worker."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    undisturbed = start(context, work, whole, {**FORTY, **recipe})
    process: BaseProcess = context.Process(target=train_until_killed, args=(work, run, {**FORTY, **recipe}))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last_state(run)["step"] == 17
    process = start(context, work, run, {**FORTY, **recipe, "num_workers": 1})
    undisturbed.join()
    process.join()
    assert process.exitcode == undisturbed.exitcode == 0
    found, expected = last_state(run), last_state(whole)
    assert found["step"] == 40
    assert ("adversary" in found, "balancer" in found) == (bool(recipe), bool(recipe))
    assert_same_state(found, expected)
    assert as_logged(run) == as_logged(whole)
    assert largest_difference(found["ema"], found["decoder"]) > 0


def test_after_a_kill_the_folder_is_free_at_once(work: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "trainer", "train"]
    long = train_words(work, tmp_path / "run", **SETTINGS | {"max_steps": 1000}, num_workers=1)
    with subprocess.Popen([*words, *long], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        began = time.monotonic()
        while checkpoint.newest(tmp_path / "run") is None:
            assert process.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.02)
        process.kill()
    stopped = last_state(tmp_path / "run")["step"]
    train(train_settings(work, tmp_path / "run", **SETTINGS | {"max_steps": stopped + 1}))
    assert last_state(tmp_path / "run")["step"] == stopped + 1
