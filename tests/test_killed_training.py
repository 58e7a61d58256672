"""SIGKILL at any moment costs time, never the result."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from tests.training_helpers import as_logged, assert_same_state, last_state, logged_steps, train_settings, train_words
from trainer import checkpoint
from trainer.loop import train

KILLS = 20
SETTINGS = {"checkpoint_every": 1, "eval_every": 2, "max_steps": 5}


def train_quietly(work: Path, run: Path) -> None:
    torch.set_num_threads(1)
    train(train_settings(work, run, **SETTINGS))


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    """Processes that start with everything imported, in milliseconds."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__, "torch._dynamo", "huggingface_hub.file_download"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield forkserver


def start(context: ForkServerContext, work: Path, run: Path) -> BaseProcess:
    process = context.Process(target=train_quietly, args=(work, run))
    process.start()
    return process


def test_killed_twenty_times(context: ForkServerContext, work: Path, tmp_path: Path) -> None:
    """Each run is killed and started again until it ends; then it is the undisturbed one, and another run begins."""
    undisturbed = tmp_path / "undisturbed"
    start(context, work, tmp_path / "warm-up").join()
    began = time.monotonic()
    process = start(context, work, undisturbed)
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0

    delays, kills, number, resumed = random.Random(0), 0, 0, set()
    while kills < KILLS or (tmp_path / str(number)).exists():
        assert number < KILLS, "most runs ended before they were killed"
        run = tmp_path / str(number)
        process = start(context, work, run)
        process.join(delays.uniform(0, seconds) if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            resumed.add(None if checkpoint.newest(run) is None else last_state(run)["step"])
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
